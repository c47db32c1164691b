#!/usr/bin/env bash
# The job that submit_doctor.sh submits: the doctor on all ranks, started as those of a training job are.
set -euo pipefail
# shellcheck source=jobs/batch.sh
source "$(dirname "${BASH_SOURCE[0]}")/batch.sh"

describe_job
lay_out
load_environment
choose_launcher
name_launcher
bind_to_gpus
export OMP_NUM_THREADS=$cores_per_rank
exec "${launcher[@]}" "$python" -m apts_mpi.doctor --run-dir "$1"
