#!/usr/bin/env bash
# Train in a batch job: [NAME=… RANKS=… WALLTIME=…] bash jobs/submit_train.sh [arguments of apts_mpi.train]
# What is stopped at the end of its wall time, or for a job that goes first, goes on by itself. The same NAME again goes
# on with a run that ended in another way, from its latest checkpoint.
set -euo pipefail
# shellcheck source=jobs/batch.sh
source "$(dirname "${BASH_SOURCE[0]}")/batch.sh"

choose_directory train
write_task "$directory" --resume "$@" >"$directory/tasks"
submit_tasks "$directory/tasks" 1
say "run directory, with the output of the job: $directory"
