"""An iteration in SimGrid: its skeleton, a C program, on simulated networks beside what the cost model predicts."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from apts_mpi.errors import InvalidInput
from apts_mpi.scaling.calls import Call, Machine
from apts_mpi.scaling.collectives import choose
from apts_mpi.scaling.cost_fit import predicted
from apts_mpi.scaling.cost_model import BUBBLE, PASSES, Shape, parts, seconds_of

SKELETON = Path(__file__).with_name("skeleton.c")

# Of SimGrid: computation is what the plan says, and links have the latency and bandwidth of the platform, no more.
SETTINGS = (
    *("--cfg=smpi/host-speed:1Gf", "--cfg=smpi/simulate-computation:no", "--cfg=network/model:CM02"),
    *("--cfg=network/TCP-gamma:0", "--cfg=network/crosstraffic:0", "--log=root.thres:error"),
)

# What the skeleton does as a pipeline, whose work it divides by micro-batches, and what is then in it.
PIPELINED = ("gradient evaluations", "Jacobian products")
IN_PIPELINES = (BUBBLE, "pipeline messages")


# Terms without work.
COMMUNICATION = ("gradient sum", "statistics sum", "assembly", "coarse reduction", "agreement", "pipeline messages")


@dataclass(frozen=True)
class Step:
    """A line of the skeleton's plan, and the term that it belongs to."""

    term: str
    algorithm: str
    group: str = "world"
    size: float = 0.0
    times: int = 1
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.algorithm} {self.group} {self.size:.0f} {self.times} {self.seconds:.9g}"


def plan(shape: Shape, values: Mapping[str, float], machine: Machine) -> list[Step]:
    """The steps of an iteration.

    Parameters
    ----------
    shape
        Of the run.
    values
        Of the unknowns, fitted.
    machine
        Whose library chooses the algorithms.
    """
    steps: list[Step] = []
    for name, term in parts(shape).items():
        if shape.stages > 1 and shape.layout == "staged" and name in PIPELINED:
            steps += _pipelines(name, seconds_of(term.work, values), values["call"], shape)
        elif name not in IN_PIPELINES:
            seconds = seconds_of(term.work, values)
            steps += [Step(name, "compute", seconds=seconds)] if seconds else []
            steps += [_step(name, call, values["call"], machine) for call in term.calls if call.ranks > 1]
    return steps


def _step(term: str, call: Call, seconds: float, machine: Machine) -> Step:
    algorithm = choose(machine.library, call.operation, call.ranks, call.size).name
    return Step(term, algorithm, call.group, call.size, call.times, seconds)


def _pipelines(term: str, seconds: float, call: float, shape: Shape) -> list[Step]:
    """Of the evaluations three of equal cost, of the products one; the activations of a micro-batch in each."""
    count, number = (PASSES, 0) if term == PIPELINED[0] else (1, 1)
    messages = parts(shape)["pipeline messages"].calls
    if number >= len(messages):
        return []
    each = seconds / count / shape.micro_batches + call
    return [Step(term, "pipeline", "replica", messages[number].size, shape.micro_batches, each)] * count


class Simulator:
    """The skeleton, compiled in a directory of its own.

    Parameters
    ----------
    directory
        For the program, plans and platforms.

    Raises
    ------
    InvalidInput
        Without SimGrid, and if its compiler fails.
    """

    def __init__(self, directory: Path) -> None:
        missing = [name for name in ("smpicc", "smpirun") if shutil.which(name) is None]
        if missing:
            raise InvalidInput(
                f"simulate needs SimGrid, and there is no {' and no '.join(missing)}; install it (Debian: apt-get "
                "install libsimgrid-dev), or give predict, which does without"
            )
        self._directory = directory
        self._program = directory / "skeleton"
        done = _run(["smpicc", "-O2", "-o", str(self._program), str(SKELETON)], directory)
        if done.returncode != 0:
            raise InvalidInput(f"simulate: smpicc cannot compile the skeleton ({_last_words(done.stderr)}); see to it")

    def seconds(self, steps: Sequence[Step], shape: Shape, machine: Machine) -> dict[str, float]:
        """Simulated seconds of each term, of the rank with most, and of the whole as ``iteration``.

        Raises
        ------
        InvalidInput
            If the simulation fails.
        """
        files = {
            "plan": "".join(f"{line}\n" for line in (shape.replicas, *steps)),
            "platform.xml": machine.network.platform(shape.ranks),
            "hosts": "".join(f"n{rank}\n" for rank in range(shape.ranks)),
        }
        for name, text in files.items():
            (self._directory / name).write_text(text, encoding="ascii")
        launcher = ["smpirun", "-np", str(shape.ranks), "-platform", "platform.xml", "-hostfile", "hosts"]
        done = _run([*launcher, *SETTINGS, str(self._program), "plan"], self._directory)
        found = [float(word) for word in done.stdout.split()] if done.returncode == 0 else []
        if len(found) != len(steps) + 1:
            raise InvalidInput(f"simulate: {shape.ranks} ranks failed ({_last_words(done.stderr)}); give fewer ranks")
        terms = {step.term: 0.0 for step in steps}
        for step, seconds in zip(steps, found, strict=False):
            terms[step.term] += seconds
        return terms | {"iteration": found[-1]}


def _run(command: Sequence[str], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


@dataclass(frozen=True)
class Compared:
    """Seconds of an iteration, predicted and simulated.

    Attributes
    ----------
    study, network, ranks
        Of what, and on what.
    predicted, simulated
        By term; the simulated ones with ``iteration``.
    calls
        Seconds of the calls before MPI has them, which both have.
    """

    study: str
    network: str
    ranks: int
    predicted: dict[str, float]
    simulated: dict[str, float]
    calls: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to the simulation."""
        return sum(self.predicted.values()) / self.simulated["iteration"] - 1.0

    @property
    def message_error(self) -> float:
        """The same of what the network takes alone: without work, and without what calls cost before MPI has them.

        What a pipeline waits for belongs to its work; 0 without messages.
        """
        known = sum(self.simulated.get(name, 0.0) for name in COMMUNICATION) - self.calls
        found = sum(self.predicted.get(name, 0.0) for name in COMMUNICATION if name not in IN_PIPELINES) - self.calls
        return found / known - 1.0 if known > 0.0 else 0.0


def compare(
    studies: Mapping[str, Sequence[Shape]], values: Mapping[str, float], machines: Sequence[Machine]
) -> list[Compared]:
    """Simulate each shape of each study on each machine, beside its prediction.

    Raises
    ------
    InvalidInput
        Without SimGrid, and if a simulation fails.
    """
    with tempfile.TemporaryDirectory(prefix="simulate-") as name:
        simulator = Simulator(Path(name))
        return [
            _compared(study, shape, values, machine, simulator)
            for study, shapes in studies.items()
            for machine in machines
            for shape in shapes
        ]


def _compared(
    study: str, shape: Shape, values: Mapping[str, float], machine: Machine, simulator: Simulator
) -> Compared:
    steps = plan(shape, values, machine)
    calls = sum(step.times * step.seconds for step in steps if step.algorithm not in ("compute", "pipeline"))
    simulated = simulator.seconds(steps, shape, machine)
    return Compared(study, str(machine.network), shape.ranks, predicted(shape, values, machine), simulated, calls)


def print_compared(found: Sequence[Compared], console: Console) -> None:
    """Print a line a simulation."""
    table = Table(
        title="an iteration, predicted and simulated",
        caption="Errors of the prediction; of messages: of what the network takes, without work and calls.",
    )
    for heading in ("study", "network", "ranks", "predicted s", "simulated s", "error", "error of messages"):
        table.add_column(heading, justify="left" if heading in ("study", "network") else "right")
    for one in found:
        seconds = f"{sum(one.predicted.values()):.4g}", f"{one.simulated['iteration']:.4g}"
        table.add_row(one.study, one.network, str(one.ranks), *seconds, _error(one.error), _error(one.message_error))
    console.print(table)


def _error(value: float) -> str:
    """No error of nothing: what is left of it is how finely one looked."""
    return f"{value:+.0%}" if abs(value) >= 0.005 else "below 1%"
