"""Checkpoints: named global arrays and small metadata in HDF5, written in parallel, complete or not there at all.

It may import errors, tools and, for the ranks that write together, parallel; to read needs no MPI, and solvers are
not known here. Read ``format`` first for what is in a file, then ``directory``, ``saving`` and ``writers`` in the
order in which a save comes to them.
"""

from apts_mpi.checkpoint.arrays import Array, Slab, split_evenly
from apts_mpi.checkpoint.claim import check_unclaimed
from apts_mpi.checkpoint.directory import CheckpointDirectory, newest_valid, resolve
from apts_mpi.checkpoint.format import Checkpoint, open_checkpoint
from apts_mpi.checkpoint.seals import DamagedCheckpoint
from apts_mpi.checkpoint.writers import hdf5_versions

__all__ = [
    "Array",
    "Checkpoint",
    "CheckpointDirectory",
    "DamagedCheckpoint",
    "Slab",
    "check_unclaimed",
    "hdf5_versions",
    "newest_valid",
    "open_checkpoint",
    "resolve",
    "split_evenly",
]
