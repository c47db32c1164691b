#!/usr/bin/env bash
# Measure scaling, a job a number of ranks and one that gathers:
#   SIZES="4 8 16" bash jobs/submit_scaling.sh strong [arguments of apts_mpi.train]
#   SIZES="4 8 16" SAMPLES_PER_RANK=256 bash jobs/submit_scaling.sh weak [arguments of apts_mpi.train]
# strong: the same iterates at every size, with a subdomain for each rank of the largest, unless --subdomains is given.
# weak: batch and subdomains grow with the ranks; give --max-iterations, and enough training samples for the largest.
set -euo pipefail
# shellcheck source=jobs/batch.sh
source "$(dirname "${BASH_SOURCE[0]}")/batch.sh"

kind=${1:-}
read -r -a sizes <<<"${SIZES:-}"
[ "${#sizes[@]}" -gt 0 ] || fail "SIZES is not given; give numbers of ranks, such as SIZES=\"4 8 16\""
# Before the first job is submitted, so that none is left over.
for RANKS in "${sizes[@]}"; do
    [[ $RANKS =~ ^[1-9][0-9]*$ ]] || fail "SIZES: '$RANKS' is not a number of ranks; give 1 or more"
    lay_out
done
case $kind in
    strong) largest=$(printf '%s\n' "${sizes[@]}" | sort -n | tail -n 1) ;;
    weak) [[ ${SAMPLES_PER_RANK:-} =~ ^[1-9][0-9]*$ ]] || fail "SAMPLES_PER_RANK: give the samples of a batch for each rank" ;;
    *) fail "'$kind' is not a kind of study; say strong or weak" ;;
esac
shift

# A run that was stopped and went on measures something else: each begins and ends in one job.
REQUEUE=no
choose_directory "$kind"
runs=() numbers=()
for RANKS in "${sizes[@]}"; do
    run=$directory/ranks_$RANKS
    mkdir -p "$run"
    case $kind in
        strong) own=--subdomains=$largest ;;
        weak) own=--batch-size=$((SAMPLES_PER_RANK * RANKS)) ;;
    esac
    write_task "$run" --overwrite "$own" "$@" >"$run/tasks"
    numbers+=("$(submit_tasks "$run/tasks" 1)")
    runs+=("$run")
done

after=("${numbers[@]}")
RANKS=1 gpus_per_node=0
lay_out
submit "$directory" 1 env "SITE=$SITE" bash "$root/jobs/batch_report.sh" "$directory" "$kind" "${runs[@]}"
say "runs, and the report at the end of the output of job-*.txt: $directory"
