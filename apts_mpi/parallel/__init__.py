"""Messages between ranks, and the memory that they come from: the only place where CUDA meets MPI.

It may import errors, options, tools and records, and knows no network. Read ``communicator`` first; ``nonblocking``
is how operations start and are waited for, ``transport`` how tensors come to MPI, ``stall`` and ``watchdog`` how a
wait comes to an end, ``launcher`` and ``gpu_direct`` whether a machine's parts go together.
"""
