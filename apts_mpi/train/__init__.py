"""The training command.

It may import everything but ``bench``, ``compare`` and ``scaling``, which import its ``options`` and ``parser`` in
turn; these two do without MPI, and nothing is imported here, so that they stay light. Read ``run`` first, a run from
its options to its summary, then ``training``, its iterations and epochs; ``layouts`` makes problem and solver.
"""
