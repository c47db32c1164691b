#!/usr/bin/env bash
# Test on this machine: bash jobs/local_test.sh [arguments of pytest]
# Tests marked mpi run at 1, 2, 3, 4 and 8 ranks, or at those in the environment variable SIZES; the others run once.
# At 1, 3 and 8 those marked all_sizes do, or with FULL=1 all of them.
set -euo pipefail
# shellcheck source=jobs/local_environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/local_environment.sh"

# Leave no rank behind, whatever ends this script; keep the results of a failure.
finish() {
    local status=$?
    stop "$child"
    stop "$beside"
    if [ "$status" -eq 0 ]; then
        rm -r "$results"
    else
        say "Reports and the output of every rank: $results"
    fi
}
stop() {
    if [ -n "$1" ]; then
        kill "$1" || true
        wait "$1" || true
    fi
}
# Run a command under the time limit, in a process group of its own, and keep its exit status in DIRECTORY.
run() {
    local directory=$1 status=0
    shift
    timeout --kill-after=10 "$limit" "$@" </dev/null &
    child=$!
    wait "$child" || status=$?
    child=
    echo "$status" >"$directory/status"
    return "$status"
}
# Run pytest without mpirun.
test_plain() {
    echo "=== without mpirun"
    mkdir "$results/plain"
    run "$results/plain" "$python" -m pytest -m "not mpi" --junit-xml="$results/plain/rank_0.xml" "$@" || true
}
# Run pytest on one of these numbers of ranks after the other.
test_ranks() {
    local sizes=$1 size directory
    shift
    for size in $sizes; do
        echo "=== $size ranks"
        directory=$results/ranks_$size
        mkdir "$directory"
        run "$directory" "$launcher" -n "$size" "$python" jobs/pytest_on_rank.py "$directory" "$@" ||
            # What rank 0 printed tells why, unless it passed or never came to its report.
            grep -Eqs '<(failure|error)[ >]' "$directory/rank_0.xml" ||
            tail -v -n 60 "$directory"/rank_*.txt 2>/dev/null || true # there may be none
    done
}

cd "$root"
prepare_environment
export OMP_NUM_THREADS=1
export MPIR_CVAR_ENABLE_HEAVY_YIELD=1 # ranks of MPICH that wait leave the cores to those that work
limit=5000                            # seconds a run: when one rank fails the others may wait for ever
results=$(mktemp -d)
child='' beside=''
trap finish EXIT

# What runs without mpirun waits for much and computes little: for other processes, Slurm's clock, stalled ranks. The
# ranks run beside it.
(
    trap 'stop "$child"' EXIT
    trap 'exit 1' TERM
    test_ranks "${SIZES:-1 2 3 4 8}" "$@"
) >"$results/ranks.txt" 2>&1 &
beside=$!
test_plain "$@"
wait "$beside" || true
beside=
cat "$results/ranks.txt"

"$python" jobs/check_every_test_ran.py "$results"
