"""Pictures of training runs, and what all pictures of the package share.

It may import errors, tools and records, and no MPI; matplotlib is imported in ``figure`` alone, which says so where
it is missing. Read ``runs`` first.
"""
