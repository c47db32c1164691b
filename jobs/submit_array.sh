#!/usr/bin/env bash
# Train with several seeds or a grid of options, a job each:
#   bash jobs/submit_array.sh OPTION=VALUE,VALUE… … [-- arguments of apts_mpi.train for all]
# For example: bash jobs/submit_array.sh seed=0,1,2 coarse.damping=0.1,0.01 -- --problem fashion-mnist
set -euo pipefail
# shellcheck source=jobs/batch.sh
source "$(dirname "${BASH_SOURCE[0]}")/batch.sh"

# Print all combinations of OPTION=VALUE, one a line.
combinations() {
    local option=${1%%=*} values value line
    IFS=, read -r -a values <<<"${1#*=}"
    shift
    for value in "${values[@]}"; do
        if [ $# -eq 0 ]; then
            echo "$option=$value"
        else
            combinations "$@" | while read -r line; do echo "$option=$value $line"; done
        fi
    done
}

grid=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    [[ $1 =~ ^[A-Za-z][A-Za-z_.-]*=[^[:space:]]+$ ]] || fail "'$1' is not OPTION=VALUE,VALUE…; put other arguments after --"
    grid+=("$1")
    shift
done
shift || true
[ "${#grid[@]}" -gt 0 ] || fail "no OPTION=VALUE,VALUE… is given, such as seed=0,1,2"

choose_directory array
combinations "${grid[@]}" | while read -r -a options; do
    run=$(IFS=, && echo "${options[*]}")
    write_task "$directory/${run//\//_}" --resume "$@" "${options[@]/#/--}"
done >"$directory/tasks"
submit_tasks "$directory/tasks" "$(wc -l <"$directory/tasks")"
say "run directories and output of the jobs: $directory"
