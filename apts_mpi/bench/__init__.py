"""Measurements of parts, as ratios within one run, and random faults that are done to runs.

It may import everything but ``compare`` and ``scaling``. A file a measurement, of which ``iteration`` is the one to
read first; ``__main__`` has their names on the command line. Of the faults, ``fault_kinds`` is what may happen,
``fault_runs`` the jobs, and ``faults`` draws and judges.
"""
