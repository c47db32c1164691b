# Sourced by batch.sh: what is LSF's own.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # batch.sh and site.sh set what is used here, and use what is set

# As in batch_slurm.sh.
submit() {
    local directory=$1 count=$2 options=() name
    shift 2
    name=$(basename "$directory")
    if [ -n "$account" ]; then options+=(-P "$account"); fi
    if [ -n "$partition" ]; then options+=(-q "$partition"); fi
    if [ "$count" -gt 1 ]; then name+="[1-$count]"; fi
    if [ "$gpus_on_node" -gt 0 ]; then options+=(-gpu "num=$gpus_on_node:mode=shared:j_exclusive=yes"); fi
    if [ -n "$memory_on_node" ]; then options+=(-R "rusage[mem=${memory_on_node}GB/host]"); fi
    # LSF itself begins a job again that ends with the status in -Q; -r is for nodes that fail.
    if [ "$REQUEUE" = yes ]; then options+=(-r -Q "$STOPPED"); else options+=(-rn); fi
    if [ "${#after[@]}" -gt 0 ]; then
        options+=(-w "$(printf 'ended(%s) && ' "${after[@]}" | sed 's/ && $//')")
    fi
    # LSF counts in minutes, and sends the signal to every process of the job.
    submit_script bsub -J "$name" -W "$(in_minutes "$(walltime_in_seconds)")" -wa USR1 -wt "$(in_minutes "$warning")" \
        -n "$RANKS" -R "span[ptile=$ranks_on_node] affinity[core($cores_per_rank)]" -o "$directory/job-%J-%I.txt" \
        "${options[@]}" "${submit_options[@]}" < <(job_script "$@") | sed 's/[^<]*<\([0-9]*\)>.*/\1/'
}

in_minutes() {
    echo $((($1 + 59) / 60))
}

# The signal tells in time.
set_clock_options() {
    clock_options=()
}

# LSB_JOBINDEX is 0 outside an array.
task_number() {
    if [ "${LSB_JOBINDEX:-0}" -eq 0 ]; then echo 1; else echo "$LSB_JOBINDEX"; fi
}

describe_job() {
    echo "job $LSB_JOBID on $LSB_MCPU_HOSTS"
}

requeue() {
    say "status $STOPPED lets LSF begin the job again"
}
