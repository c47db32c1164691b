#!/usr/bin/env bash
# Run a command with the cores and the memory of the NUMA domain next to this rank's GPU: bash jobs/bind_to_gpu.sh COMMAND…
# NUMA_OF_GPU has the domains in the order of the GPUs; jobs put this between launcher and program.
set -euo pipefail
# shellcheck source=jobs/messages.sh
source "$(dirname "${BASH_SOURCE[0]}")/messages.sh"

number=${SLURM_LOCALID:-${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID:-${PALS_LOCAL_RANKID:-0}}}}
read -r -a domains <<<"$NUMA_OF_GPU"
type -P numactl >/dev/null || fail "numactl is not installed here: leave numa_of_gpu empty in the site's file"
[ "$number" -lt "${#domains[@]}" ] ||
    fail "numa_of_gpu: no NUMA domain is given for GPU $number of this node; give as many as there are GPUs"
domain=${domains[$number]}
exec numactl --cpunodebind="$domain" --membind="$domain" "$@"
