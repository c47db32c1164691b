# Sourced by the scripts that run Python: the environment .venv and the MPI that runs it.
# VENV=.venv-parallel-hdf5 chooses the one that setup_parallel_hdf5.sh makes. MPIRUN is the launcher of the MPI to make
# .venv for, instead of the active one; empty, it stands for MPICH from its wheel. TORCH_INDEX is where torch is sought
# besides pip's own sources when .venv is made: PyTorch's builds for CPUs, or, empty, nowhere, which gives that for CUDA.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=jobs/messages.sh
source "$root/jobs/messages.sh"
venv=$root/${VENV:-.venv}
python=$venv/bin/python # by its path, as some launchers put a Python of theirs first on PATH
stamp=$venv/set_up # what it was made from; empty until the set-up is complete
constraints=$root/jobs/constraints.txt
torch_index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}

# The Python and the MPI sought below are the user's, even where an environment made here is activated.
kept=
while read -r -d : directory; do
    [ -e "$directory/../set_up" ] || kept+=:$directory
done <<<"$PATH:"
PATH=${kept#:}

# Open MPI refuses root and more ranks than cores unless told, and then wastes the cores on waiting ranks unless told to
# yield; the other launchers ignore these variables.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export OMPI_MCA_mpi_yield_when_idle=1

# Put the environment first on PATH and set `launcher`. Make .venv where it is missing or out of date.
prepare_environment() {
    local active
    active=$(find_active_mpi)
    if [ -z "${VENV:-}" ]; then
        make_environment "$active"
    elif ! [ -x "$venv/bin/mpirun" ] || ! grep -qxF "$(describe_requirements)" "$stamp"; then
        fail "$venv is missing or out of date: call jobs/setup_parallel_hdf5.sh"
    fi
    PATH=$venv/bin:$PATH
    launcher=$active
    if [ -x "$venv/bin/mpirun" ]; then launcher=$venv/bin/mpirun; fi
    say "MPI: $(describe_launcher "$launcher")"
}

# The launcher of the MPI that the user has chosen, or nothing.
find_active_mpi() {
    local active
    active=${MPIRUN-$(type -P mpirun || type -P mpiexec || true)}
    # One among the system's programs may be there for another environment: a .venv with an MPI of its own keeps that.
    if [ -z "${MPIRUN-}" ] && [ -x "$venv/bin/mpirun" ] && [ "$(dirname "$active")" -ef /usr/bin ]; then return; fi
    echo "$active"
}

# Make the environment for the MPI of a launcher, unless it is there and was made from the same.
make_environment() {
    local active=$1 wanted
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "Python 3.10 or newer is needed as python3: load its module or activate its environment"
    wanted=$(describe_set_up "$active")
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        empty_environment "$wanted"
        fill_environment "$active"
        printf '%s\n' "$wanted" >"$stamp"
    fi
}

# All that the environment depends on, a line each.
describe_set_up() {
    python3 -c 'import sys; print("Python:", sys.version.split()[0], "in", sys.prefix)'
    if [ -n "$1" ]; then
        echo "active MPI: $(describe_launcher "$(readlink -f "$1")")"
    else
        echo "active MPI: none"
    fi
    echo "place: $root"
    describe_requirements
}

describe_requirements() {
    echo "requirements: $(cd "$root" && cat setup.cfg jobs/constraints.txt | cksum)"
}

describe_launcher() {
    echo "$1, $("$1" --version 2>&1 | tr -d '\0' | sed -n 1,2p | tr -s '[:space:]' ' ')"
}

empty_environment() {
    if [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
        [ -e "$stamp" ] || fail "$venv was not made by this script: move it away and call again"
        if [ -s "$stamp" ]; then
            say "Making $venv again, as something changed (< then, > now):"
            diff "$stamp" - <<<"$1" | grep '^[<>]' >&2 || true
        else
            say "Making $venv again, as its set-up was interrupted"
        fi
    fi
    mkdir -p "$venv"
    : >"$stamp"
    find "$venv/" -mindepth 1 -maxdepth 1 ! -name "$(basename "$stamp")" -exec rm -rf {} +
}

fill_environment() {
    say "Setting up $venv, once: this takes some minutes"
    # Debian's Python may have pip but not the ensurepip that venv needs; virtualenv brings a pip of its own.
    python3 -m venv "$venv" >/dev/null || {
        python3 -m pip install --quiet --target "$venv/virtualenv" virtualenv
        PYTHONPATH=$venv/virtualenv python3 -m virtualenv --quiet "$venv"
    }
    # torch comes first and alone. PyTorch's own index has the CPU build, 2.13.0+cpu, which pip prefers to 2.13.0, the
    # CUDA build of several GB; where that index cannot be reached pip soon takes what its other sources have.
    pip_install --no-deps --retries 1 --timeout 15 ${torch_index:+--extra-index-url "$torch_index"} torch
    pip_install --editable "${root}[compare,deepxde,frameworks,plot,tensorboard,test]"
    install_mpi "$1"
}

pip_install() {
    "$python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" "$@"
}

# Use the active MPI where mpi4py can, else MPICH from its wheel.
install_mpi() {
    local active=$1
    if [ -n "$active" ]; then
        if mpi_works "$active" || build_mpi4py "$active"; then return; fi
        say "$active is active, but mpi4py finds no MPI library that fits it:"
        tail -n 5 "$venv/mpi_check.txt" >&2
        say "Using MPICH from its wheel instead"
        pip_install --force-reinstall --no-deps mpi4py
    fi
    pip_install mpich
    mpi_works "$venv/bin/mpirun" || {
        cat "$venv/mpi_check.txt" >&2
        fail "$venv/bin/mpirun does not start two ranks that reach each other"
    }
}

# The wheel of mpi4py does not find every MPI; built with the MPI's own compiler it does. No cache: pip would take an
# earlier build for another MPI from it.
build_mpi4py() {
    local mpicc
    mpicc=$(dirname "$1")/mpicc
    [ -x "$mpicc" ] || return
    say "Building mpi4py with $mpicc, which takes some minutes more"
    MPICC=$mpicc pip_install --force-reinstall --no-deps --no-cache-dir --no-binary mpi4py mpi4py && mpi_works "$1"
}

# Whether two ranks reach each other: where launcher and library are of two kinds, every rank is alone. One process
# without launcher must work too, as a launcher may find the library for its ranks only.
mpi_works() {
    {
        timeout 60 "$python" -c 'from mpi4py import MPI' &&
            timeout --kill-after=10 60 "$1" -n 2 "$python" -c \
                'import sys; from mpi4py import MPI; sys.exit(MPI.COMM_WORLD.allreduce(1) != 2)'
    } </dev/null >"$venv/mpi_check.txt" 2>&1
}
