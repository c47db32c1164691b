"""What is looked for in the values of arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from apts_mpi.errors import InvalidInput


def check_finite(path: Path, name: str, values: np.ndarray) -> None:
    """Raise `InvalidInput` for an array with nan or inf in it, naming the first place."""
    finite = np.isfinite(values)
    if finite.all():
        return
    place = [int(index) for index in np.argwhere(~finite)[0]]
    raise InvalidInput(f"{path}: {name} has {values[tuple(place)]} at {place}; give a checkpoint from before that")
