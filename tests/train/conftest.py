"""Training within the processes of the tests, which spares the start of others."""

import functools
import sys

import pytest
from mpi4py import MPI

from apts_mpi.tools.signals import StopSignals
from apts_mpi.train.__main__ import main
from apts_mpi.train.command import train
from apts_mpi.train.layouts import make_training
from apts_mpi.train.run import run


@pytest.fixture
def directory(mpi_tmp_path, monkeypatch):
    """An empty current directory, the same on all ranks; what `main` adds to the path is taken away."""
    monkeypatch.chdir(mpi_tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return mpi_tmp_path


@pytest.fixture
def command(directory, capfd):
    """A function of arguments that calls the command on all ranks: gives this rank's status, output and errors."""

    def call(*arguments):
        capfd.readouterr()
        status = 0
        try:
            main(list(arguments))
        except SystemExit as ended:
            status = ended.code
        # Else another rank may look before rank 0 has written, or write while it looks.
        MPI.COMM_WORLD.Barrier()
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def trained(command):
    """A function of arguments that trains on all ranks, to the end or to another ``status``; gives what was printed."""

    def call(*arguments, status=0):
        found, output, errors = command(*arguments)
        assert found == status, output + errors
        return output + errors

    return call


@pytest.fixture
def trained_on(world, directory, capfd):
    """A function of a number of ranks and arguments: trains on the first ranks, while the others wait."""

    def call(ranks, *arguments):
        capfd.readouterr()
        comm = world.Split(int(world.rank < ranks), world.rank)
        if world.rank < ranks:
            assert train(arguments, functools.partial(run, make_training, StopSignals()), comm) == 0
        comm.Free()
        world.Barrier()
        return capfd.readouterr().out

    return call
