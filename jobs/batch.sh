# Sourced by the scripts that submit jobs and by the job itself: the site, the scheduler and what they share.
# A job does tasks: lines of arguments of apts_mpi.train, in a file `tasks` of its directory; an array does one a member.
# Environment variables: RANKS (default: a full node), WALLTIME as HH:MM:SS (default 01:00:00), NAME of the directory
# under runs/ (default: the kind of job and the time), SITE (default: site.sh here). DRY_RUN=1 submits nothing, and prints
# the scheduler's command and the script that it would get.
# shellcheck shell=bash
# shellcheck disable=SC2034 # those that source this file use what it sets

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=jobs/messages.sh
source "$root/jobs/messages.sh"
SITE=$(realpath "${SITE:-$root/jobs/site.sh}")
[ -r "$SITE" ] || fail "SITE: '$SITE' cannot be read; give a copy of jobs/site.sh"
# What a site need not say.
gigabytes_per_rank='' numa_of_gpu=()
# shellcheck source=jobs/site.sh
source "$SITE"
[[ $gigabytes_per_rank =~ ^([1-9][0-9]*)?$ ]] ||
    fail "gigabytes_per_rank: '$gigabytes_per_rank' is not a number of gigabytes; give 1 or more, or nothing, in $SITE"
case $scheduler in
    slurm | pbs | lsf) ;;
    *) fail "scheduler: '$scheduler' is not known; say slurm, pbs or lsf in $SITE" ;;
esac
# shellcheck source=jobs/batch_slurm.sh
source "$root/jobs/batch_$scheduler.sh"

RANKS=${RANKS:-$ranks_per_node}
WALLTIME=${WALLTIME:-01:00:00}
DRY_RUN=${DRY_RUN:-0}
exec 3>&1 # what dry runs print, also where the answer of the scheduler is kept
REQUEUE=${REQUEUE:-yes} # whether a run that was stopped goes on by itself
STOPPED=75 # exit status of a run that was stopped and can go on
after=() # jobs that the next one waits for

# Set `directory`, new or of an earlier job, for jobs of a kind.
choose_directory() {
    directory=$PWD/runs/${NAME:-$1-$(date +%Y%m%d-%H%M%S)}
    if [ "$DRY_RUN" = 1 ] && ! [ -e "$directory" ]; then trap 'rm -r "$directory"' EXIT; fi
    mkdir -p "$directory"
}

# Call the scheduler's command, with the script from the input; what it answers is for the one who submits.
submit_script() {
    if [ "$DRY_RUN" != 1 ]; then
        "$@"
        return
    fi
    {
        echo "# $(printf '%q ' "$@")<<'END'"
        cat
        echo "END"
    } >&3
    echo JOB # in the place of its number
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
    if [ "$DRY_RUN" = 1 ]; then show_tasks "$tasks"; fi
    submit "$(dirname "$tasks")" "$count" env "SITE=$SITE" "RANKS=$RANKS" "WALLTIME=$WALLTIME" "REQUEUE=$REQUEUE" \
        "TASK=${TASK:-}" bash "$root/jobs/batch_train.sh" "$tasks"
}

# Print how each task of a file would be started.
show_tasks() {
    local task
    choose_launcher
    bind_to_gpus
    while read -r task; do
        echo "# ${launcher[*]} python -m apts_mpi.train $task"
    done <"$1" >&3
}

# Say to the ranks how many the job has, and what starts them: ranks that start alone are then named, with the remedy.
name_launcher() {
    export APTS_MPI_RANKS=$RANKS APTS_MPI_LAUNCHER="${launcher[*]}"
}

# Put what binds each rank to the cores and the memory next to its GPU behind the launcher, where the site says which.
bind_to_gpus() {
    if [ "$gpus_on_node" -gt 0 ] && [ "${#numa_of_gpu[@]}" -gt 0 ]; then
        launcher+=(env "NUMA_OF_GPU=${numa_of_gpu[*]}" bash "$root/jobs/bind_to_gpu.sh")
    fi
}

# Set `nodes`, `ranks_on_node`, `gpus_on_node`, `cores_per_rank` and, in gigabytes, `memory_on_node` for RANKS.
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
    memory_on_node=
    if [ -n "$gigabytes_per_rank" ]; then memory_on_node=$((gigabytes_per_rank * ranks_on_node)); fi
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
