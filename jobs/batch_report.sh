#!/usr/bin/env bash
# The last job of a scaling study: gather the runs of the others. submit_scaling.sh submits it.
set -euo pipefail
# shellcheck source=jobs/batch.sh
source "$(dirname "${BASH_SOURCE[0]}")/batch.sh"

directory=$1 kind=$2
shift 2
describe_job
load_environment
rm -f "$directory/studies.h5" # of an earlier study with this name, whose runs were replaced
# Of a weak study of which one size came to its end the batches do not tell what it was.
exec "$python" -m apts_mpi.scaling report --kind "$kind" --json "$directory/scaling.json" --hdf5 "$directory/studies.h5" "$@"
