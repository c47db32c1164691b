"""What a checkpoint holds of a solver, as named arrays and metadata, whichever ranks and layout saved it.

It may import `schwarz`, `checkpoint` and what these may. Read `solver` first; `local_solvers` has the part that depends
on subdomains, `moving` takes it to others, `tensors` has the names.
"""
