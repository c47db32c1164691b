#!/usr/bin/env bash
# Train on this machine: bash jobs/local_train.sh [arguments of apts_mpi.train]
# The environment variable RANKS sets the number of ranks (default 8).
set -euo pipefail
# shellcheck source=jobs/local_environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/local_environment.sh"

ranks=${RANKS:-8}
prepare_environment

cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # without them, as nproc obeys them
if [ "$ranks" -gt "$cores" ]; then
    export OMP_NUM_THREADS=1
else
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / ranks))}"
fi
exec "$launcher" -n "$ranks" "$python" -m apts_mpi.train "$@"
