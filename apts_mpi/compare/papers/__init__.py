"""The methods of the papers beside tuned Adam and SGD, over numbers of subdomains: what the papers claim, tried.

It may import what the comparison may. Read ``claims`` first, then ``runs``.
"""
