"""Random faults, drawn from a seed and done to real training jobs, and what became of the runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

from apts_mpi.bench.fault_kinds import KINDS, Kind, Place
from apts_mpi.bench.fault_runs import ITERATIONS, PAUSE, Finished, Job, References, Setting, write_problem
from apts_mpi.checkpoint.directory import saved_steps
from apts_mpi.errors import InvalidInput
from apts_mpi.tools import environment
from apts_mpi.tools.command import FILE_WIDTH, said_once, say
from apts_mpi.tools.jobs import check_can_start
from apts_mpi.tools.status import FAILED, USAGE

# What is counted. A fault that came after the iterations which are compared is none of these.
VERDICTS = RIGHT, WRONG, LOST, HUNG = "right", "wrong", "lost", "hung"
LATE = "late"

SOLVERS = ("sgd", "adam", "kfac", "lsr1")
COARSE = ("none", "gauss-newton")
SAVING = (
    ("--checkpoint-every=1",),
    ("--checkpoint-every=3",),
    ("--checkpoint-every=1", "--checkpoint-in-background"),
    ("--checkpoint-every=10min",),
)

# Epochs, of three batches, after which a fault comes; seconds later; and seconds from the start for an early one.
EPOCHS, LATER, EARLY = 4, 0.25, (1.5, 5.0)

# Calls of the loss, of which an iteration has four or more; the first ones are of the checks before it.
CALLS = (20, 60)


@dataclass(frozen=True)
class Fault:
    """What is drawn.

    Attributes
    ----------
    number
        From 0.
    kind
        Its name.
    place
        See `Place`.
    epoch, delay
        The moment: so many seconds after the end of this epoch, or, where it is 0, after the start of the job.
    call
        Of the loss, for what happens in it.
    setting, saving
        The run, and its options for checkpoints.
    resumed
        The run that goes on with it.
    """

    number: int
    kind: str
    place: Place
    epoch: int
    delay: float
    call: int
    setting: Setting
    saving: Sequence[str]
    resumed: Setting

    @property
    def words(self) -> str:
        """On one line."""
        moment = f"{self.delay:.2f} s after " + (f"epoch {self.epoch}" if self.epoch else "the start")
        return (
            f"{self.kind}; rank {self.place.rank}, {moment}; {self.setting.name}; {' '.join(self.saving)}; "
            f"resumed on {self.resumed.ranks}"
        )


@dataclass(frozen=True)
class Outcome:
    """What became of a run: the verdict, the reason for one that is not right, and the commands that were started."""

    verdict: str
    reason: str
    commands: Sequence[str]


def draws(seed: int, ranks: int, kinds: Sequence[Kind] = KINDS) -> Iterator[Fault]:
    """Faults without end: of the kinds that so many ranks can have, each once before one comes twice."""
    kinds = [kind for kind in kinds if kind.least <= ranks]
    number = 0
    while True:
        for kind in Random(f"{seed} {number}").sample(kinds, len(kinds)):
            yield draw(number, kind, ranks, Random(f"{seed} {number} {kind.name}"))
            number += 1


def draw(number: int, kind: Kind, ranks: int, random: Random) -> Fault:
    """One fault of a kind."""
    setting = draw_setting(random.randint(kind.least, ranks), random)
    epoch = random.randint(0 if kind.early else 1, EPOCHS)
    rank = random.randrange(setting.ranks)
    if kind.action and setting.layout == "staged":
        # The last stage has the loss.
        rank = setting.ranks - setting.replicas + rank % setting.replicas
    return Fault(
        number=number,
        kind=kind.name,
        place=Place(rank, random.random()),
        epoch=epoch,
        delay=random.uniform(*EARLY) if epoch == 0 else random.uniform(0.0, LATER),
        call=random.randint(*CALLS),
        setting=setting,
        saving=random.choice(SAVING),
        resumed=on_ranks(setting, random.choice([setting.ranks, random.randint(1, ranks)])),
    )


def draw_setting(ranks: int, random: Random) -> Setting:
    """A run on so many ranks."""
    staged = ranks > 1 and random.random() < 0.5
    return Setting(
        ranks=ranks,
        launched=ranks > 1 or random.random() < 0.5,
        layout="staged" if staged else "replicated",
        replicas=2 if ranks == 4 and random.random() < 0.5 else 1,
        micro_batches=random.randint(1, 3) if staged else 1,
        solver=random.choice(SOLVERS),
        coarse=random.choice(COARSE),
    )


def on_ranks(setting: Setting, ranks: int) -> Setting:
    """The same run on another number of ranks."""
    replicas = setting.replicas if ranks % setting.replicas == 0 else 1
    return replace(setting, ranks=ranks, launched=setting.launched or ranks > 1, replicas=replicas)


def carry_out(fault: Fault, kind: Kind, directory: Path, references: References) -> Outcome:
    """Do a fault to a run, resume it, and judge what became of it.

    Parameters
    ----------
    fault, kind
        What.
    directory
        A new one, for the run and all that is printed.
    references
        The runs that are never stopped.
    """
    whole = references.of(fault.setting) if kind.compares else None
    directory.mkdir(parents=True)
    write_problem(directory, kind.action or "pass", fault.place.rank, fault.call, PAUSE)
    with Job(directory, "fault", fault.setting, [*arguments(fault.setting, fault), *kind.options]) as job:
        if not kind.action and fault.epoch:
            job.wait_for("epoch ", fault.epoch)
        if not kind.action:
            environment.pause(fault.delay)
        before = job.newest() if kind.keeps else None
        ending = kind.do(job, fault.place)
        status, left = job.end(), job.left()
    commands = [shlex.join(job.command)]
    if status is None:
        return Outcome(HUNG, "the job did not end", commands)
    reason = ending.wrong(status, job.output) or (f"{left} processes were left behind" if left else "")
    after = job.newest()
    if reason:
        return Outcome(WRONG, reason, commands)
    if (after or 0) >= ITERATIONS:
        return Outcome(LATE, f"the run was at iteration {after}", commands)
    stopped = re.search(r"stopped after iteration (\d+)", job.output)
    saved = max(before or 0, int(stopped[1]) if stopped else 0)
    if (after or 0) < saved:
        return Outcome(LOST, f"saved at iteration {saved}, and {after} is the newest checkpoint", commands)
    return resume(fault, kind, job, whole, commands)


def arguments(setting: Setting, fault: Fault) -> list[str]:
    """Of the training command: one serves at first and when the run goes on."""
    return [*setting.arguments(), *fault.saving, "--run-dir=run", "--resume"]


def resume(fault: Fault, kind: Kind, job: Job, whole: Finished | None, commands: list[str]) -> Outcome:
    """Go on with a run that has ended, and judge what it comes to."""
    newest = job.newest()
    steps = saved_steps(job.checkpoints) if newest is not None else []
    going = kind.harm(job.checkpoints, steps, fault.place) if steps else None
    # The same text, for whoever looks at it, with no call that it is for.
    write_problem(job.directory, kind.action or "pass", fault.place.rank)
    options = [*arguments(fault.resumed, fault), f"--max-iterations={ITERATIONS}"]
    with Job(job.directory, "resumed", fault.resumed, options) as resumed:
        status, left = resumed.end(), resumed.left()
    commands = [*commands, shlex.join(resumed.command)]
    if status is None:
        return Outcome(HUNG, "the resumed job did not end", commands)
    output = resumed.output
    missing = [words for words in (going.words if going else ()) if words not in output]
    if going is not None and going.iteration is None:
        told_once = output.count("apts_mpi.train: error:") == 1 and "Traceback" not in output and not missing
        right = status == USAGE and told_once and not left
        return Outcome(RIGHT if right else WRONG, "" if right else "it was not refused in one line", commands)
    if status != 0 or left:
        words = f"the resumed run ended with status {status} and left {left} processes behind"
        return Outcome(WRONG, words, commands)
    found = re.search(r"resumed after iteration (\d+)", output)
    begun, expected = int(found[1]) if found else 0, going.iteration if going else 0
    if begun < (expected or 0):
        return Outcome(LOST, f"resumed after iteration {begun}, where {expected} was saved", commands)
    reason = f"the resumed run did not say {missing[0]!r}" if missing else compare(fault, job, whole)
    return Outcome(WRONG if reason else RIGHT, reason, commands)


def compare(fault: Fault, job: Job, whole: Finished | None) -> str:
    """What sets the run apart from the one that was never stopped; empty if nothing does."""
    try:
        finished = Finished.read(job.directory / "run")
    except (OSError, ValueError, RuntimeError) as error:
        return f"the files of the resumed run cannot be read: {error}"
    if whole is None:
        last = finished.records[-1]["train_loss"]
        return "" if last is not None else "the resumed run has no loss at its end"
    same = (fault.setting.ranks, fault.setting.replicas) == (fault.resumed.ranks, fault.resumed.replicas)
    return whole.difference(finished, same)


def faults(seconds: float, seed: int, ranks: int, directory: Path) -> int:
    """Do faults for some seconds, print what became of each and a table; return the exit status."""
    try:
        check_can_start(ranks, "apts_mpi.bench faults")
    except InvalidInput as error:
        with said_once():
            print(f"apts_mpi.bench: error: {error}", file=sys.stderr)
        return USAGE
    # As Ctrl-C: no job is to outlive the command.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    return campaign(seconds, seed, ranks, directory / f"faults-{seed}", KINDS, console)


def campaign(seconds: float, seed: int, ranks: int, directory: Path, kinds: Sequence[Kind], console: Console) -> int:
    """The same for some kinds; ``directory`` is made anew, and keeps what was not right."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    by_name = {kind.name: kind for kind in kinds}
    references = References(directory / "never-stopped")
    start, done = environment.seconds(), []
    for fault in draws(seed, ranks, kinds):
        begun = environment.seconds()
        if begun - start > seconds:
            break
        place = directory / f"{fault.number:04d}"
        outcome = carry_out(fault, by_name[fault.kind], place, references)
        taken = environment.seconds() - begun
        reason = f" ({outcome.reason}; see {place})" if outcome.reason else ""
        say(console, f"{fault.number:4d} {outcome.verdict:5s} {taken:5.1f} s  {fault.words}{reason}")
        if outcome.verdict in (RIGHT, LATE):
            shutil.rmtree(place)
        done.append((fault, outcome))
        write_record(directory, seed, ranks, done)
    print_table(done, seed, console)
    return FAILED if any(outcome.verdict in (WRONG, LOST, HUNG) for _, outcome in done) else 0


def write_record(directory: Path, seed: int, ranks: int, done: Sequence[tuple[Fault, Outcome]]) -> None:
    """All so far, with what draws it again."""
    counts = Counter(outcome.verdict for _, outcome in done)
    record: dict[str, Any] = {
        "seed": seed,
        "ranks": ranks,
        "versions": environment.versions(),
        "counts": {verdict: counts[verdict] for verdict in (*VERDICTS, LATE)},
        "faults": [asdict(fault) | asdict(outcome) for fault, outcome in done],
    }
    (directory / "faults.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def print_table(done: Sequence[tuple[Fault, Outcome]], seed: int, console: Console) -> None:
    """The counts by kind, and of all."""
    table = Table(title=f"faults, seed {seed}")
    for column in ("fault", "tried", *VERDICTS):
        table.add_column(column, justify="left" if column == "fault" else "right")
    tried = [(fault.kind, outcome.verdict) for fault, outcome in done if outcome.verdict != LATE]
    for name in [*sorted({kind for kind, _ in tried}), ""]:
        own = [verdict for kind, verdict in tried if name in ("", kind)]
        table.add_row(name or "all", str(len(own)), *(str(own.count(verdict)) for verdict in VERDICTS))
    console.print(table)
