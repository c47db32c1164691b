"""Curvature: of single layers (K-FAC, diagonals), of blocks (rows of Gauss-Newton), along columns (tangents, products).

It may import `objective` and what that may. Read `kinds` first for K-FAC, with the protocol in `layer`;
`linearisation` for the coarse level, and `carrying` for how tangents pass an operation; `dense` and `rows` for the
Gauss-Newton matrix of small blocks.
"""
