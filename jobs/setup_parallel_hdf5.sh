#!/usr/bin/env bash
# Make the environment .venv-parallel-hdf5, whose h5py lets all ranks write one file: bash jobs/setup_parallel_hdf5.sh
# It takes the active MPI (a module) with its parallel HDF5 (in HDF5_DIR, or where h5pcc is), else Debian's packages.
set -euo pipefail
export VENV=.venv-parallel-hdf5
# shellcheck source=jobs/local_environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/local_environment.sh"

packages=(libhdf5-openmpi-dev libopenmpi-dev openmpi-bin)

# Set `compiler`, `mpirun` and `hdf5`, the directory of the library.
choose_mpi() {
    local found
    compiler=$(type -P mpicc || true)
    if [ -z "$compiler" ] || [ "$(dirname "$compiler")" -ef /usr/bin ]; then
        install_packages
        compiler=/usr/bin/mpicc.openmpi
        mpirun=/usr/bin/mpirun.openmpi
        hdf5=$(echo /usr/lib/*/hdf5/openmpi)
    else
        mpirun=$(dirname "$compiler")/mpirun
        found=$(type -P h5pcc || true)
        hdf5=${HDF5_DIR:-${found%/bin/h5pcc}}
    fi
    [ -x "$mpirun" ] || fail "$compiler has no mpirun beside it: load the module of a whole MPI"
    compgen -G "$hdf5/lib*/libhdf5.so" >/dev/null ||
        fail "no HDF5 library in '$hdf5', for $compiler: load the module of a parallel HDF5, or set HDF5_DIR"
}

install_packages() {
    dpkg -s "${packages[@]}" >/dev/null 2>&1 && return
    type -P apt-get >/dev/null ||
        fail "no MPI compiler is active: load the modules of an MPI and of its parallel HDF5, then call again"
    [ "$(id -u)" -eq 0 ] ||
        fail "no MPI compiler is active: load the modules of an MPI and of its parallel HDF5, or let root call" \
            "apt-get install ${packages[*]}; then call again"
    say "Installing ${packages[*]}"
    { apt-get update && apt-get install -y --no-install-recommends "${packages[@]}"; } >/dev/null
}

# Install h5py from the cache, or build it, which takes some minutes, and put it there.
install_h5py() {
    local cache wheel
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/apts_mpi/h5py-$(describe_build | sha256sum | cut -c 1-16)
    if ! compgen -G "$cache/*.whl" >/dev/null; then
        say "Building h5py with $compiler for $hdf5: this takes some minutes"
        pip_install cython pkgconfig "setuptools>=77" wheel
        # Without isolation, in which pip would build mpi4py too; without pip's cache, which knows nothing of the MPI.
        CC=$compiler HDF5_MPI=ON HDF5_DIR=$hdf5 "$python" -m pip wheel --quiet --disable-pip-version-check \
            --constraint "$constraints" --no-deps --no-build-isolation --no-binary h5py --no-cache-dir \
            --wheel-dir "$venv/built" h5py
        wheel=$(basename "$venv"/built/h5py-*.whl)
        mkdir -p "$cache"
        cp "$venv/built/$wheel" "$cache/incomplete"
        mv "$cache/incomplete" "$cache/$wheel"
    fi
    pip_install --force-reinstall --no-deps "$cache"/*.whl
}

# All that the built h5py depends on.
describe_build() {
    "$python" -VV
    uname -m
    grep -E '^(h5py|mpi4py|numpy)=' "$constraints"
    describe_launcher "$mpirun"
    echo "$hdf5"
    cat "$hdf5"/lib*/libhdf5.so
}

# Whether two ranks write one file.
h5py_works() {
    timeout --kill-after=10 60 "$mpirun" -n 2 "$python" -c '
import sys

import h5py
from mpi4py import MPI

ranks = MPI.COMM_WORLD
with h5py.File(sys.argv[1], "w", driver="mpio", comm=ranks) as file:
    file.create_dataset("ranks", 2, int)[ranks.rank] = ranks.rank
' "$venv/h5py_check.h5" </dev/null >"$venv/h5py_check.txt" 2>&1
}

choose_mpi
make_environment "$mpirun"
mpi_works "$mpirun" || {
    cat "$venv/mpi_check.txt" >&2
    fail "mpi4py finds no MPI library that fits $mpirun"
}
h5py_works || install_h5py
h5py_works || {
    cat "$venv/h5py_check.txt" >&2
    fail "with the h5py built for $hdf5 two ranks cannot write one file: is it a parallel HDF5 for $mpirun?"
}
# The environment's own launcher, whichever else is on PATH. By this alone prepare_environment knows that it is complete.
printf '#!/bin/sh\nexec %q "$@"\n' "$mpirun" >"$venv/bin/mpirun"
chmod +x "$venv/bin/mpirun"
say "Ready. For the tests: VENV=$VENV bash jobs/local_test.sh; to work in it: source $VENV/bin/activate"
