"""A network as the solver sees it: one flat vector of parameters, a sequence of segments, and subdomains of both.

It may import `errors`, `options`, `tools` and `parallel`. Read `parameters` first, then `segments` and `partition`: the
rest follows from these. Nothing here knows of a loss.
"""
