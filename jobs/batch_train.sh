#!/usr/bin/env bash
# The job itself, on its first node: do one task of a file, and see to it that it goes on if it is stopped.
# The scripts submit_*.sh submit it.
set -euo pipefail
# shellcheck source=jobs/batch.sh
source "$(dirname "${BASH_SOURCE[0]}")/batch.sh"

# Run a command and set `status` to that of it. A signal to this shell becomes SIGUSR1 for the launcher, which hands it
# to the ranks: MPICH's would kill them on SIGTERM.
run() {
    local running
    trap 'kill -USR1 "$running" 2>/dev/null || true' USR1 TERM
    "$@" &
    running=$!
    status=0
    # A signal ends `wait`, not the command.
    while wait "$running" && status=0 || status=$?; kill -0 "$running" 2>/dev/null; do :; done
    trap - USR1 TERM
}

tasks=$1
describe_job
lay_out
set_clock_options
load_environment
choose_launcher
name_launcher
bind_to_gpus
read_task "$tasks" "$(task_number)"
export OMP_NUM_THREADS=$cores_per_rank

# A job that has GPUs is not to compute on CPUs unnoticed. An option of the task comes later, and counts.
device_options=()
if [ "$gpus_on_node" -gt 0 ]; then device_options=(--device cuda); fi

run "${launcher[@]}" "$python" -m apts_mpi.train "${device_options[@]}" "${arguments[@]}" "${clock_options[@]}"

if [ "$status" -eq "$STOPPED" ] && [ "$REQUEUE" = yes ]; then
    requeue
fi
exit "$status"
