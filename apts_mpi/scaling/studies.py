"""What scaling studies measured, in one HDF5 file.

The file has the attributes ``format`` and ``version``, a dataset ``runs/NUMBER/seconds`` of each run with the seconds
of its iterations and, as attributes of that group, ``kind`` (strong or weak), ``cores`` and as text ``summary`` (JSON)
and ``configuration`` (YAML). ``reduced_model`` has one row a size: its columns, and seconds.
"""

from __future__ import annotations

import io
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from apts_mpi.errors import InvalidInput
from apts_mpi.scaling.measured import MeasuredRun

FORMAT, VERSION = "apts_mpi scaling studies", 1


@dataclass(frozen=True)
class Studies:
    """What a file holds.

    Attributes
    ----------
    runs
        In their order.
    reduced_model : dict of int to float
        Seconds of forming and solving reduced models, by their numbers of columns.
    """

    runs: tuple[MeasuredRun, ...] = ()
    reduced_model: dict[int, float] = field(default_factory=dict)


def read_studies(path: Path) -> Studies:
    """What a file holds.

    Raises
    ------
    InvalidInput
        If it cannot be read, or is no file of scaling studies.
    """
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != FORMAT:
                raise InvalidInput(f"{path} is an HDF5 file of something else; give one that apts_mpi.scaling has made")
            if file.attrs["version"] != VERSION:
                raise InvalidInput(f"{path} is of version {file.attrs['version']}, not {VERSION}; measure again")
            runs = tuple(_read(file["runs"][name]) for name in sorted(file["runs"]))
            return Studies(runs, {int(columns): float(time) for columns, time in file["reduced_model"][()]})
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        words = re.search("error message = '(.*?)'", str(error))  # HDF5's text is long, and of several lines
        reason = words[1] if words else " ".join(str(error).split())
        raise InvalidInput(f"{path} cannot be read as an HDF5 file of scaling studies ({reason}); give one") from error


def _read(group: h5py.Group) -> MeasuredRun:
    attributes = group.attrs
    return MeasuredRun(
        attributes["kind"],
        tuple(group["seconds"][()].tolist()),
        json.loads(attributes["summary"]),
        attributes["configuration"],
        int(attributes["cores"]),
    )


def write_studies(path: Path, studies: Studies) -> None:
    """Write a file anew: complete, or as it was before.

    Raises
    ------
    InvalidInput
        If it cannot be written.
    """
    # In memory: on a full disk HDF5 ends the process by a segmentation fault.
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.attrs.update({"format": FORMAT, "version": VERSION})
        file["reduced_model"] = np.array(list(studies.reduced_model.items()), dtype=float).reshape(-1, 2)
        runs = file.create_group("runs")
        for number, run in enumerate(studies.runs):
            group = runs.create_group(f"{number:06}")
            group["seconds"] = np.array(run.seconds)
            group.attrs.update({"kind": run.kind, "cores": run.cores, "configuration": run.configuration})
            group.attrs["summary"] = json.dumps(run.summary)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written ({error}); give another file") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
