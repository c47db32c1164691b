"""The loss of a batch as a function of the flat parameters: value, gradient, and the caches of local objectives.

It may import what `network` may, and `network`. Read `objective` first, with `passes` beside it; `batch` says how
samples come to passes, `reduction` how the gradients of the ranks are summed while the backward pass runs.
"""
