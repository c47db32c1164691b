"""Strong and weak studies on this machine: one run after the other, those that are measured left out."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from apts_mpi.errors import InvalidInput, require
from apts_mpi.scaling.adding import add_runs
from apts_mpi.scaling.measured import MeasuredRun, check_belong_together, read_measured_run, without_places
from apts_mpi.scaling.studies import Studies
from apts_mpi.tools import environment
from apts_mpi.tools.jobs import OUTPUT, check_can_start, failure_in
from apts_mpi.train.parser import parse, spell

# Options that a study sets itself, and one with which a run would not be one from start to end.
OWN = ("--run_dir", "--overwrite", "--resume")


@dataclass(frozen=True)
class Study:
    """What to measure.

    Parameters
    ----------
    kind
        ``strong`` or ``weak``.
    ranks
        Numbers of ranks.
    repeats
        Runs of each.
    samples_per_rank
        Of a batch, in a weak study.
    arguments
        Of apts_mpi.train.

    Raises
    ------
    InvalidInput
        For values that cannot be used.
    """

    kind: str
    ranks: tuple[int, ...]
    repeats: int
    samples_per_rank: int | None
    arguments: tuple[str, ...]

    def __post_init__(self) -> None:
        require(all(ranks >= 1 for ranks in self.ranks), "ranks", self.ranks, "give numbers of 1 or more")
        require(self.repeats >= 1, "repeats", self.repeats, "give 1 or more")
        samples = self.samples_per_rank
        if self.kind == "weak":
            require(samples is not None and samples >= 1, "samples_per_rank", samples, "a weak study needs 1 or more")
        else:
            require(samples is None, "samples_per_rank", samples, "it is for a weak study; leave it out")
        for argument in spell(self.arguments):
            if argument.startswith(OWN):
                raise InvalidInput(f"{argument}: the study sets this option itself; leave it out")
        check_can_start(max(self.ranks), "apts_mpi.scaling")

    def arguments_of(self, ranks: int) -> list[str]:
        """Arguments of the run with so many ranks: one problem in a strong study, more samples in a weak one."""
        if self.kind == "weak":
            return [*self.arguments, f"--batch-size={(self.samples_per_rank or 0) * ranks}"]
        # The same iterates at every size, with a subdomain for each rank of the largest.
        return [f"--subdomains={max(self.ranks)}", *self.arguments]

    def configuration(self, ranks: int) -> str:
        """The configuration that the record of such a run has."""
        return without_places(yaml.safe_load(parse(self.arguments_of(ranks))[1]))


def run_study(study: Study, path: Path, report: Callable[[str], None]) -> Studies:
    """Measure what the file has not, one run after the other; each is in the file once it has ended.

    Parameters
    ----------
    study
        What to measure.
    path
        The HDF5 file.
    report
        Called with a line for each run.

    Raises
    ------
    InvalidInput
        Before the first run if the options or the file cannot be used, and if a run fails.
    """
    configurations = {ranks: study.configuration(ranks) for ranks in study.ranks}
    # Written before anything is measured, so that a file that cannot be costs no run.
    studies = add_runs(path, [])
    for configuration in configurations.values():
        _check_belongs(studies, path, yaml.safe_load(configuration))
    for ranks, configuration in configurations.items():
        measured = [
            run
            for run in studies.runs
            if (run.kind, run.ranks, run.configuration) == (study.kind, ranks, configuration)
        ]
        if measured:
            report(f"{study.kind}, {ranks} rank(s): {len(measured)} measured before")
        for _ in range(study.repeats - len(measured)):
            run = measure(study, ranks)
            check_belong_together([*studies.runs, run])
            studies = add_runs(path, [run])
            report(f"{study.kind}, {ranks} rank(s): {run.median:.4g} s an iteration")
    return studies


def _check_belongs(studies: Studies, path: Path, options: dict[str, Any]) -> None:
    """Raise `InvalidInput` if a file has runs of another problem or optimizer; parameters are known after a run."""
    for run, name in itertools.product(studies.runs, ("problem", "optimizer")):
        if run.options.get(name) != options[name]:
            raise InvalidInput(
                f"{name}: {options[name]!r} is not that of the runs in {path}, {run.options.get(name)!r}; "
                "give another file"
            )


def measure(study: Study, ranks: int) -> MeasuredRun:
    """Do one run, in a directory that is then removed.

    Raises
    ------
    InvalidInput
        If it fails, with its last words.
    """
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        directory = Path(name)
        program = [sys.executable, "-m", "apts_mpi.train", *study.arguments_of(ranks), f"--run-dir={directory / 'run'}"]
        with open(directory / OUTPUT, "w", encoding="utf-8") as output:
            done = subprocess.run(
                ["mpirun", "-n", str(ranks), *program],
                # A thread a rank unless the user says otherwise, so that all sizes have as many.
                env={"OMP_NUM_THREADS": "1"} | environment.outside_job(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        if done.returncode != 0:
            raise InvalidInput(f"the run with {ranks} rank(s) failed: {failure_in(directory / OUTPUT)}")
        run = read_measured_run(directory / "run", len(environment.cores()))
    return replace(run, kind=study.kind)
