"""Continual learning by other methods, which the trust region in the Fisher metric is set beside.

They share network, tasks, batches and stored samples with a run of ``apts_mpi.train``, and train by Adam. Read
``penalties`` first, what they add to the loss, then ``methods`` and ``__main__``.
"""
