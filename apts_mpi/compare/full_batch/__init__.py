"""Second-order methods of the literature on full batches of squares: what APTS is compared with on PINNs.

They share nothing with the solver: rows of Jacobians come from `torch.func`. It may import problems, records and tools,
no solver and no MPI. Read ``squares`` first, the loss as they see it, then ``spring``; each method is a file, a line in
``registry``, and ``run`` does one.
"""
