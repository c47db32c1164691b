"""What all packages share, and what the commands share.

The clock, the environment and the random state, which are used nowhere else; timers and counters of events; exit
statuses, the version, streams that may be lost, and jobs that a command starts. It may import ``errors`` and
``options``, and no MPI. Read ``environment`` first, then ``events``.
"""
