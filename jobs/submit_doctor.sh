#!/usr/bin/env bash
# Examine the nodes in a batch job, before the first run: [NAME=… RANKS=… WALLTIME=…] bash jobs/submit_doctor.sh
# The output says whether the launcher of the site's file, MPI, cores, GPUs and file system are fit, and what to do.
set -euo pipefail
# shellcheck source=jobs/batch.sh
source "$(dirname "${BASH_SOURCE[0]}")/batch.sh"

REQUEUE=no
choose_directory doctor
lay_out
submit "$directory" 1 env "SITE=$SITE" "RANKS=$RANKS" bash "$root/jobs/batch_doctor.sh" "$directory"
say "directory with the output of the job: $directory"
