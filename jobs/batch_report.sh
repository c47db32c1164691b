#!/usr/bin/env bash
# The last job of a scaling study: gather the runs of the others. submit_scaling.sh submits it.
set -euo pipefail
# shellcheck source=jobs/batch.sh
source "$(dirname "${BASH_SOURCE[0]}")/batch.sh"

directory=$1
shift
describe_job
load_environment
rm -f "$directory/studies.h5" # of an earlier study with this name, whose runs were replaced
exec "$python" -m apts_mpi.scaling report --json "$directory/scaling.json" --hdf5 "$directory/studies.h5" "$@"
