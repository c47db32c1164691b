# Sourced by batch.sh: what is Slurm's own.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # batch.sh and site.sh set what is used here, and use what is set

# Submit COMMAND, as an array if COUNT is above 1, with its output in DIRECTORY; print the number of the job.
# It begins when the jobs in the array `after` have ended, however they did.
submit() {
    local directory=$1 count=$2 options=()
    shift 2
    if [ -n "$account" ]; then options+=(--account="$account"); fi
    if [ -n "$partition" ]; then options+=(--partition="$partition"); fi
    if [ "$count" -gt 1 ]; then options+=(--array="1-$count"); fi
    if [ "$gpus_on_node" -gt 0 ]; then options+=(--gres="gpu:$gpus_on_node"); fi
    if [ -n "$memory_on_node" ]; then options+=(--mem="${memory_on_node}G"); fi
    if [ "$REQUEUE" = yes ]; then options+=(--requeue); else options+=(--no-requeue); fi
    if [ "${#after[@]}" -gt 0 ]; then options+=(--dependency="afterany:$(IFS=: && echo "${after[*]}")"); fi
    # B: the batch shell gets the signal and hands it on; without, srun's ranks would get it and mpirun's would not.
    submit_script sbatch --parsable --job-name="$(basename "$directory")" --time="$WALLTIME" --signal="B:USR1@$warning" \
        --nodes="$nodes" --ntasks="$RANKS" --ntasks-per-node="$ranks_on_node" --cpus-per-task="$cores_per_rank" \
        --output="$directory/job-%j.txt" --open-mode=append "${options[@]}" "${submit_options[@]}" \
        < <(job_script "$@") | cut -d ';' -f 1 # a cluster's name may follow
}

# The signal tells in time.
set_clock_options() {
    clock_options=()
}

task_number() {
    echo "${SLURM_ARRAY_TASK_ID:-1}"
}

describe_job() {
    echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"
}

# Begin the same job again; it keeps its number and its output.
requeue() {
    scontrol requeue "$SLURM_JOB_ID"
}
