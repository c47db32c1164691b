"""Continual learning by other methods, which the trust region in the Fisher metric is set beside.

They share network, tasks, batches and stored samples with a run of ``apts_mpi.train``, and train by Adam. It
may import what the comparison may. Read ``penalties`` first, what they add to the loss, then ``methods``.
"""
