"""Runs put into the file of scaling studies, and what of this machine a new file has beside them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apts_mpi.errors import InvalidInput
from apts_mpi.scaling.measured import MeasuredRun, check_belong_together
from apts_mpi.scaling.studies import Studies, read_studies, write_studies
from apts_mpi.tools.environment import seconds

try:
    from apts_mpi.curvature.linearisation import Column
    from apts_mpi.schwarz.column_products import inner_products
    from apts_mpi.schwarz.reduced_model import ReducedModel
except ImportError as error:
    raise InvalidInput(f"hdf5: to put runs into a file needs mpi4py, which cannot be imported ({error})") from error

# Columns of the reduced models that are timed, and how often; the least counts, as other programs only add to it.
REDUCED_MODELS, REPEATS = (16, 32, 64, 128, 256), 5


def add_runs(path: Path, runs: Iterable[MeasuredRun]) -> Studies:
    """Put runs into a file, which is made if it does not exist; those that it has already count once.

    Raises
    ------
    InvalidInput
        If they do not belong together with those of the file, or it cannot be read or written.
    """
    earlier = read_studies(path) if path.exists() else Studies((), time_reduced_models())
    studies = Studies(tuple({_key(run): run for run in (*earlier.runs, *runs)}.values()), earlier.reduced_model)
    check_belong_together(studies.runs)
    write_studies(path, studies)
    return studies


def _key(run: MeasuredRun) -> tuple[Any, ...]:
    return run.kind, run.configuration, run.ranks, run.seconds


def time_reduced_models() -> dict[int, float]:
    """Seconds on this machine of forming and solving reduced models, by their numbers of columns.

    The columns lie side by side, as those of the corrections do. Runs have few columns, whose eigen-decomposition
    nobody sees; with thousands it is all that one sees.
    """
    generator = np.random.default_rng(0)
    found = {}
    for count in REDUCED_MODELS:
        columns = [Column(index, index + 1, torch.ones(1)) for index in range(count)]
        factor = generator.standard_normal((count, count))
        curvature, slope = factor @ factor.T, generator.standard_normal(count)
        times = []
        for _ in range(REPEATS):
            start = seconds()
            model = ReducedModel(slope, curvature, inner_products(columns).numpy())
            model.minimise(1.0, 0.1, "2")
            times.append(seconds() - start)
        found[count] = min(times)
    return found
