"""Scaling studies: runs at several numbers of ranks, their report, and a cost model that predicts more ranks.

It may import records, plot and the options of training; ``adding``, ``root``, ``gpt`` and ``subdomains`` alone import
parts of a solver, so that reports and predictions work without MPI. Read ``measured`` and ``report`` first, then
``cost_model`` for the formulas, with ``collectives`` and ``network`` for what messages take; ``simulate`` does them by
``skeleton.c``.
"""
