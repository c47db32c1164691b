"""Draw the methods of the papers: ``python docs/images/draw_papers.py DIRECTORY FILE [SUBDOMAINS]``.

DIRECTORY is that of a problem, which ``python -m apts_mpi.compare papers PROBLEM`` has made. Accuracy against the
evaluations of gradients, medians over the seeds, of the methods with 6 or SUBDOMAINS subdomains and of Adam and SGD at
their best step size.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from apts_mpi.options.methods import METHODS
from apts_mpi.records.reading import read_records

METRIC = "test_accuracy"


def curve(runs: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Evaluations and accuracy at the ends of epochs, medians over the runs."""
    found = [read_records(run) for run in runs]
    names = "gradient_evaluations", METRIC
    columns = [np.median([record.column("epochs", name) for record in found], axis=0) for name in names]
    return columns[0], columns[1]


def main(directory: Path, file: str, subdomains: str = "6") -> None:
    """Draw them in one picture."""
    finished = sorted(path.parent for path in directory.glob("*-seed*/summary.json"))
    groups = {
        name: list(runs) for name, runs in itertools.groupby(finished, lambda run: run.name.rpartition("-seed")[0])
    }
    chosen = {name: curve(groups[f"{name}-{subdomains}"]) for name in METHODS}
    for optimizer in ("adam", "sgd"):
        rates = {name: curve(runs) for name, runs in groups.items() if name.startswith(f"{optimizer}-")}
        best = max(rates, key=lambda name: rates[name][1][-1])
        chosen[best.replace("-", ", step size ", 1)] = rates[best]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, (evaluations, accuracy) in chosen.items():
        axes.plot(evaluations, accuracy, marker=".", label=name)
    axes.set(xscale="log", xlabel="evaluations of the gradient", ylabel="test accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
