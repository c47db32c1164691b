#!/usr/bin/env bash
# All that runs on a GPU: bash jobs/gpu_check.sh [FILE of the results, default gpu_check.json]
# One and two ranks on the first GPU. It takes 8 minutes at most; what is not done by then is said to be so. The status
# is 1 if a part failed. Environment variables: PARTS (default: all of them, see below) are the ones to do; DRY_RUN=1 does
# them on the CPU, shortened, and leaves out what needs a GPU.
set -euo pipefail
# shellcheck source=jobs/local_environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/local_environment.sh"

file=$(realpath "${1:-gpu_check.json}")
all_parts="doctor iteration iteration-2 staged staged-2 direct-2 bfloat16-2 stages-2 tests"
parts=${PARTS:-$all_parts}
for part in $parts; do
    [[ " $all_parts " == *" $part "* ]] || fail "PARTS: '$part' is not known; choose of $all_parts"
done
limit=470 # seconds for all parts, which leaves some to put the results together
most=120  # for one of them, but for the tests: MPI may hang on memory of GPUs

prepare_environment
device=cuda
iteration=(--repetitions 20 --rounds 2 --problems "mlp-2000,text-64")
training=(--problem digits --epochs 10 --subdomains 4)
if [ "${DRY_RUN:-0}" = 1 ]; then
    device=cpu
    iteration=(--repetitions 1 --rounds 1 --problems none)
    training=(--problem digits --max-iterations 2 --subdomains 4)
else
    # Torch's first GPU in each process, whose ranks share it.
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
    CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        fail "torch finds no GPU here; give DRY_RUN=1 for the same on the CPU, or TORCH_INDEX= for a torch for CUDA"
fi
# Sums in one order, whatever else the GPU does.
export CUBLAS_WORKSPACE_CONFIG=:4096:8 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export MPIR_CVAR_ENABLE_HEAVY_YIELD=1

results=$(mktemp -d)
trap 'rm -r "$results"' EXIT

# Do a part within the time that is left for it: its output, status and seconds are kept in a directory of its name.
run() {
    local part=$1 begun=$SECONDS left=$((limit - SECONDS)) status=0
    shift
    if [ "$part" != tests ] && [ "$left" -gt "$most" ]; then left=$most; fi
    mkdir "$results/$part"
    if [ "$left" -lt 1 ]; then
        status=124
    else
        timeout --kill-after=5 "$left" "$@" </dev/null >"$results/$part/output" 2>"$results/$part/errors" || status=$?
    fi
    echo "$status $((SECONDS - begun))" >"$results/$part/status"
    say "$part: status $status, $((SECONDS - begun)) s"
}
train() {
    local part=$1 ranks=$2
    shift 2
    run "$part" "$launcher" -n "$ranks" "$python" -m apts_mpi.train "${training[@]}" --device "$device" \
        --run-dir "$results/$part/run" "$@"
}

cd "$root"
for part in $parts; do
    case $part in
        doctor) run "$part" "$launcher" -n 2 "$python" -m apts_mpi.doctor --json --run-dir "$results" ;;
        iteration) run "$part" "$python" -m apts_mpi.bench iteration "${iteration[@]}" --device "$device" \
            --json "$results/iteration.json" ;;
        iteration-2) run "$part" "$launcher" -n 2 "$python" -m apts_mpi.bench iteration "${iteration[@]}" \
            --problems none --device "$device" --json "$results/iteration-2.json" ;;
        staged) train "$part" 1 --transport staged ;;
        staged-2) train "$part" 2 --transport staged ;;
        direct-2) train "$part" 2 --transport direct ;;
        bfloat16-2) train "$part" 2 --autocast bfloat16 --transport staged ;;
        stages-2) train "$part" 2 --layout staged --transport staged ;;
        tests) run "$part" "$python" -m pytest -q -m gpu --junit-xml "$results/tests.xml" tests/gpu ;;
    esac
done
"$python" jobs/gpu_check_results.py "$results" "$device" "$file"
