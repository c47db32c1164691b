# Sourced by the scripts that submit jobs and by the job itself: the site, the scheduler and what they share.
# A job does tasks: lines of arguments of apts_mpi.train, in a file `tasks` of its directory; an array does one a member.
# Environment variables: RANKS (default: a full node), WALLTIME as HH:MM:SS (default 01:00:00), NAME of the directory
# under runs/ (default: the kind of job and the time), SITE (default: site.sh here).
# shellcheck shell=bash
# shellcheck disable=SC2034 # those that source this file use what it sets

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=jobs/messages.sh
source "$root/jobs/messages.sh"
SITE=$(realpath "${SITE:-$root/jobs/site.sh}")
[ -r "$SITE" ] || fail "SITE: '$SITE' cannot be read; give a copy of jobs/site.sh"
# shellcheck source=jobs/site.sh
source "$SITE"
case $scheduler in
    slurm | pbs | lsf) ;;
    *) fail "scheduler: '$scheduler' is not known; say slurm, pbs or lsf in $SITE" ;;
esac
# shellcheck source=jobs/batch_slurm.sh
source "$root/jobs/batch_$scheduler.sh"

RANKS=${RANKS:-$ranks_per_node}
WALLTIME=${WALLTIME:-01:00:00}
REQUEUE=${REQUEUE:-yes} # whether a run that was stopped goes on by itself
STOPPED=75 # exit status of a run that was stopped and can go on
after=() # jobs that the next one waits for

# Set `directory`, new or of an earlier job, for jobs of a kind.
choose_directory() {
    directory=$PWD/runs/${NAME:-$1-$(date +%Y%m%d-%H%M%S)}
    mkdir -p "$directory"
}

# Print a task, as a line that `read_task` takes apart: arguments of apts_mpi.train, in RUN, with --resume or --overwrite.
write_task() {
    local run=$1 mode=$2 argument
    shift 2
    for argument in "$@"; do
        case $argument in
            --run[-_]dir* | --resume* | --overwrite*) fail "$argument: the job sets this option itself; give NAME" ;;
        esac
    done
    printf '%q ' "$@" "--run-dir=$run" "$mode"
    echo
}

# Set `arguments` to those of task number INDEX of a file.
read_task() {
    local line
    line=$(sed -n "$2p" "$1")
    [ -n "$line" ] || fail "$1 has no task $2"
    arguments=()
    eval "arguments=($line)"
}

# Submit the tasks of a file, and print the number of the job.
submit_tasks() {
    local tasks=$1 count=$2
    lay_out
    submit "$(dirname "$tasks")" "$count" env "SITE=$SITE" "RANKS=$RANKS" "WALLTIME=$WALLTIME" "REQUEUE=$REQUEUE" \
        "TASK=${TASK:-}" bash "$root/jobs/batch_train.sh" "$tasks"
}

# Set `nodes`, `ranks_on_node`, `gpus_on_node` and `cores_per_rank` for RANKS.
lay_out() {
    nodes=1
    ranks_on_node=$RANKS
    if [ "$RANKS" -gt "$ranks_per_node" ]; then
        [ $((RANKS % ranks_per_node)) -eq 0 ] ||
            fail "RANKS: $RANKS do not fill nodes of $ranks_per_node; give a multiple, or change $SITE"
        nodes=$((RANKS / ranks_per_node))
        ranks_on_node=$ranks_per_node
    fi
    gpus_on_node=$((gpus_per_node == 0 ? 0 : ranks_on_node))
    cores_per_rank=$((cores_per_node / ranks_per_node))
    [ "$cores_per_rank" -ge 1 ] || fail "ranks_per_node: $ranks_per_node have no core each; change $SITE"
}

walltime_in_seconds() {
    local hours minutes seconds
    IFS=: read -r hours minutes seconds <<<"$WALLTIME"
    echo $((10#$hours * 3600 + 10#$minutes * 60 + 10#$seconds))
}

# A script that becomes a command, so that the scheduler signals that. The scheduler keeps a copy, which does not know
# where it came from: hence full paths.
job_script() {
    echo '#!/usr/bin/env bash'
    printf 'cd %q || exit\n' "$PWD"
    echo "exec $(printf '%q ' "$@")"
}

[[ $ranks_per_node =~ ^[1-9][0-9]*$ ]] ||
    fail "ranks_per_node: '$ranks_per_node' is not a number of ranks; give 1 or more in $SITE, also for nodes without GPUs"
[[ $RANKS =~ ^[1-9][0-9]*$ ]] || fail "RANKS: '$RANKS' is not a number of ranks; give 1 or more"
[[ $WALLTIME =~ ^[0-9]+:[0-5][0-9]:[0-5][0-9]$ ]] || fail "WALLTIME: '$WALLTIME' is not a time; give HH:MM:SS"
[ "$(walltime_in_seconds)" -gt "$warning" ] ||
    fail "WALLTIME: $WALLTIME is within the $warning seconds of warning; give more, or change $SITE"
