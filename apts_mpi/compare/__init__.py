"""APTS beside tuned optimizers: runs of the training command, done and put into tables and plots.

It may import records, plot, problems and the options of training, and no solver and no MPI: where all runs are
finished it works without. Read ``runs`` first, which there are and how they are done, then ``table``.
"""
