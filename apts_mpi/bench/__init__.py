"""Measurements of parts, as ratios within one run.

It may import everything but ``compare`` and ``scaling``. A file a measurement, of which ``iteration`` is the one to
read first; ``__main__`` has their names on the command line.
"""
