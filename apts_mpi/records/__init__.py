"""The run directory, written by the training command and read back by all that look at runs.

It may import errors, options and tools, and no MPI: what is finished can be read anywhere. Read ``directory`` first
for what is in which file, then ``lasting`` for how it is written, and ``reading``, the one reader.
"""
