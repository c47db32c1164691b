"""Draw accuracies of tasks after tasks: ``python docs/images/draw_tasks.py FILE TITLE=RUN …``.

Each RUN is the directory of a run on a sequence of tasks, such as ``python -m apts_mpi.train --problem permuted-digits
--run-dir RUN``; each has a square of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def main(file: str, *runs: str) -> None:
    """Draw them side by side."""
    figure = Figure(figsize=(2.6 * len(runs) + 0.8, 3.0), layout="constrained")
    for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        title, _, directory = run.partition("=")
        found = json.loads((Path(directory) / "summary.json").read_text(encoding="utf-8"))["continual"]
        image = axes.imshow(found["accuracies"], vmin=0.0, vmax=1.0, cmap="viridis")
        for row, values in enumerate(found["accuracies"]):
            for column, value in enumerate(values):
                colour = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        count = len(found["tasks"])
        axes.set(title=title, xlabel="of task", xticks=range(count), yticks=range(count))
        axes.set(xticklabels=range(1, count + 1), yticklabels=range(1, count + 1))
    figure.axes[0].set_ylabel("after task")
    figure.colorbar(image, ax=figure.axes, label="held-out accuracy", shrink=0.8)
    figure.savefig(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
