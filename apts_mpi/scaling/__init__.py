"""Scaling studies: runs at several numbers of ranks, their report, and a cost model that predicts more ranks.

It may import records, plot and the options of training; ``adding`` alone imports a solver, whose reduced models it
times, so that reports and predictions work without MPI. Read ``measured`` and ``report`` first, then ``cost_model``
for the formulas.
"""
