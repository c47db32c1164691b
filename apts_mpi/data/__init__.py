"""Samples that are read as they are asked for: from arrays, from HDF5 files, from data sets and loaders of torch's.

It may import errors, options and tools, and no MPI: what is read where, others say. Read ``source`` first, what all of
them can do, then ``half``, by which a solver has the inputs or the targets of a source as if they were a tensor.
"""

from apts_mpi.data.half import Half
from apts_mpi.data.order import Order
from apts_mpi.data.source import Source
from apts_mpi.data.taking import Taken, take_over

__all__ = ["Half", "Order", "Source", "Taken", "take_over"]
