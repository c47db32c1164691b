# Sourced by batch.sh: what is PBS Pro's own.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # batch.sh and site.sh set what is used here, and use what is set

# As in batch_slurm.sh.
submit() {
    local directory=$1 count=$2 options=() chunk
    shift 2
    if [ -n "$account" ]; then options+=(-A "$account"); fi
    if [ -n "$partition" ]; then options+=(-q "$partition"); fi
    if [ "$count" -gt 1 ]; then options+=(-J "1-$count"); fi
    if [ "$REQUEUE" = yes ]; then options+=(-r y); else options+=(-r n); fi
    if [ "${#after[@]}" -gt 0 ]; then options+=(-W "depend=afterany:$(IFS=: && echo "${after[*]}")"); fi
    chunk=$nodes:ncpus=$((ranks_on_node * cores_per_rank)):mpiprocs=$ranks_on_node:ompthreads=$cores_per_rank
    if [ "$gpus_on_node" -gt 0 ]; then chunk+=:ngpus=$gpus_on_node; fi
    if [ -n "$memory_on_node" ]; then chunk+=:mem=${memory_on_node}gb; fi
    submit_script qsub -N "$(basename "$directory" | cut -c 1-15)" -l walltime="$WALLTIME" -l select="$chunk" -l place=scatter \
        -j oe -o "$directory/" "${options[@]}" "${submit_options[@]}" < <(job_script "$@")
}

# PBS gives no warning that every site passes on: the run watches the clock itself.
set_clock_options() {
    clock_options=(--walltime "$(($(walltime_in_seconds) - warning))s")
}

# A job of an array that goes on has its number in TASK, see `requeue`.
task_number() {
    echo "${TASK:-${PBS_ARRAY_INDEX:-1}}"
}

describe_job() {
    echo "job $PBS_JOBID on $(sort -u "$PBS_NODEFILE" | tr '\n' ' ')"
}

# A user cannot have a job of his begin again (qrerun is the operators'): submit the rest as a new one. Where jobs must
# not be submitted from the nodes: ssh to a login node here.
requeue() {
    TASK=$(task_number) submit_tasks "$tasks" 1
}
