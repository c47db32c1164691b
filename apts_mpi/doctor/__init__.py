"""Whether a machine, its MPI and its file system are fit for a run.

It may import what is before ``objective`` in the list of packages, and no solver. Read ``diagnosis`` first, pure
functions that judge what was found; ``probes`` are the tries on the machine, ``examination`` makes and prints them
all. ``shared_memory`` finds and removes what killed jobs left, without MPI.
"""
