"""Event files for TensorBoard, written while a run trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apts_mpi.errors import InvalidInput

# Where a value stands on the horizontal axis, and what is the same for all.
AXES = {"iteration", "epoch"}


def check_tensorboard() -> None:
    """Raise `InvalidInput` where the package that writes event files is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise InvalidInput(
            f"tensorboard: its package cannot be imported ({error}); pip install apts_mpi[tensorboard], or leave "
            "--tensorboard out"
        ) from error


class ScalarWriter:
    """Writes the records of a run as scalars. For rank 0 alone.

    Parameters
    ----------
    path
        Directory of the event files; those that are there stay.
    done
        Iterations that the run has done; what the files there say of later ones no longer counts.
    """

    def __init__(self, path: Path, done: int) -> None:
        # Optional, and a second to import.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(path), purge_step=done + 1 if done else None)

    def write(self, values: Mapping[str, Any]) -> None:
        """Take in the record of an iteration or of an epoch."""
        group = "epoch" if "train_loss" in values else "iteration"
        for name, value in _scalars(values):
            self._writer.add_scalar(f"{group}/{name}", value, values["iteration"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def _scalars(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}{name}/")
        elif name not in AXES and value is not None:
            found.append((prefix + name, float(value)))
    return found
