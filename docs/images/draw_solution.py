"""Draw the solution of Burgers' equation and its error: ``python docs/images/draw_solution.py RUN [FILE]``.

RUN is the directory of a run, ``python -m apts_mpi.train --problem burgers --run-dir RUN``; without FILE it is
burgers.png beside this program.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from apts_mpi.checkpoint import Checkpoint, resolve
from apts_mpi.plot.solution import plot_solution
from apts_mpi.problems import build, burgers, pinn


def network_of(run: Path) -> torch.nn.Module:
    """The network as the run's last checkpoint has it."""
    network = build("burgers").network
    with Checkpoint(resolve(run / "checkpoints")) as checkpoint:
        prefix = "parameters/"
        names = [name for name in checkpoint.names if name.startswith(prefix)]
        network.load_state_dict({name[len(prefix) :]: torch.from_numpy(checkpoint.read(name)) for name in names})
    return network


def main(run: Path, file: Path) -> None:
    """Draw it."""
    axes = np.linspace(0.0, 1.0, 101), np.linspace(-1.0, 1.0, 401)
    grid = pinn.grid_of(*axes)
    with torch.no_grad():
        found = network_of(run)(torch.from_numpy(grid).float()).double().numpy()
    plot_solution(axes, burgers.solution(grid).reshape(101, 401), found.reshape(101, 401), [file])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else Path(sys.argv[1]) / "solution.png"))
