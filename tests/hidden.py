"""Libraries that are as if they were not installed."""

import sys


def hide_matplotlib(monkeypatch):
    """Nor does any file of the package keep what it has imported of it."""
    for name in list(sys.modules):
        if name.split(".")[0] == "matplotlib":
            monkeypatch.setitem(sys.modules, name, None)
        elif name.startswith("apts_mpi.") and name.endswith((".figure", ".plots", "plot.runs")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def hide(monkeypatch, name):
    """A library that is imported where it is needed alone."""
    monkeypatch.setitem(sys.modules, name, None)
