"""``python -m apts_mpi.train``: the command line of a training run."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jsonargparse
import torch
from mpi4py import MPI
from rich.console import Console
from rich.progress import Progress

from apts_mpi.checkpoint import CheckpointDirectory
from apts_mpi.errors import InvalidInput, SharedFailure, SharedInvalidInput, StallError, require, require_choice
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.gpu_direct import PROBE_LIMIT, choose_transport
from apts_mpi.parallel.launcher import check_launcher, mpi_version
from apts_mpi.parallel.transport import choose_device, use_transport
from apts_mpi.parallel.watchdog import Watch, end_job, turn
from apts_mpi.problems import build
from apts_mpi.records.directory import TENSORBOARD, TRACE, RunDirectory, make_directory, print_summary
from apts_mpi.tools import environment
from apts_mpi.tools.command import FAILED, REQUEUE, USAGE
from apts_mpi.tools.events import Events
from apts_mpi.train.checkpointing import Survival
from apts_mpi.train.log_view import event_table, print_events
from apts_mpi.train.options import TrainingOptions
from apts_mpi.train.resume import (
    CHECKPOINTS,
    LATEST_OF_RUN,
    goes_on_in,
    history_of,
    open_earlier,
    replaces,
    run_directory,
    same_subdomains,
)
from apts_mpi.train.signals import StopSignals
from apts_mpi.train.staged import StagedTraining, build_staged_problem
from apts_mpi.train.tensorboard import ScalarWriter, check_tensorboard
from apts_mpi.train.trace import Trace
from apts_mpi.train.training import Training

# Seconds that a rank waits for others, unless the user says otherwise: longer than a checkpoint takes.
STALL_TIMEOUT = 600.0

# Groups of which the first option is named by the group's own name: --global-step first-order.
SHORT_FORMS = {"--global_step": "--global_step.model", "--coarse": "--coarse.model"} | {
    f"--{name}": f"--pipeline.{name}"
    for name in ("micro_batches", "schedule", "cuts", "balance", "cache_dtype", "recompute")
}

# Options that need no value.
SWITCHES = (
    *("--overwrite", "--checkpoint_in_background", "--view", "--monitor"),
    *("--log_view", "--trace", "--tensorboard"),
)


def make_parser() -> jsonargparse.ArgumentParser:
    """The parser: one option a field of `TrainingOptions`, nested groups with dots, ``--config FILE.yaml``."""
    parser = jsonargparse.ArgumentParser(
        prog="apts_mpi.train",
        description="Train a network over MPI ranks. Hyphens in names of options may be written for underscores.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="Read options from a YAML file.")
    parser.add_class_arguments(TrainingOptions, as_group=False)
    return parser


def spell(arguments: Sequence[str]) -> list[str]:
    """Options as the parser knows them: underscores for hyphens, short forms and switches written out."""
    spelled: list[str] = []
    for argument, following in itertools.pairwise([*arguments, ""]):
        if match := re.match(r"--([A-Za-z][^=]*)", argument):
            name = "--" + match.group(1).replace("-", "_")
            argument = SHORT_FORMS.get(name, name) + argument[match.end() :]
            if argument in SWITCHES and following not in ("true", "false"):
                argument += "=true"
            if argument == "--resume" and (not following or following.startswith("-")):
                argument += f"={LATEST_OF_RUN}"
        spelled.append(argument)
    return spelled


def parse(arguments: Sequence[str], earlier: str = "") -> tuple[TrainingOptions, str]:
    """The options, and the configuration as YAML that makes the same run again in a new directory.

    Parameters
    ----------
    arguments
        Of the command line.
    earlier
        Configuration of a run that is resumed, which the arguments change.

    Raises
    ------
    InvalidInput
        For an option or a value that is not known.
    """
    parser = make_parser()
    try:
        parsed = parser.parse_args([*([f"--config={earlier}"] if earlier else []), *spell(arguments)])
    except (argparse.ArgumentError, TypeError) as error:
        _refuse_value(str(error))
        raise InvalidInput(f"{' '.join(str(error).split())}; --help lists the options and their values") from error
    values = dict(vars(parser.instantiate(parsed)))
    del values["config"]
    parsed.run_dir, parsed.resume, parsed.overwrite = None, None, False
    return TrainingOptions(**values), parser.dump(parsed)


def _refuse_value(message: str) -> None:
    """Raise `InvalidInput` with the choices, for the parser's message on a value of an option that has some."""
    found = re.match(r'Parser key "([\w.]+)":.*Got value: (.*)', message, re.DOTALL)
    if found is None:
        return
    option, value = found.groups()
    kind: Any = TrainingOptions
    for name in option.split("."):
        kind = get_type_hints(kind).get(name, object)
    if get_origin(kind) is Literal:
        require_choice(option, value, get_args(kind))
    if get_origin(kind) is tuple:
        names = get_args(get_args(kind)[0])
        remedy = f"give a list of {', '.join(names)}, such as [{','.join(names[:2])}]"
        require(False, option, value, remedy)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, on all ranks of ``MPI.COMM_WORLD``; the process ends with a status that says how it went."""
    world = MPI.COMM_WORLD
    try:
        check_launcher(world)
        status = train(sys.argv[1:] if arguments is None else arguments, world)
    except (SharedInvalidInput, SharedFailure) as error:
        if world.rank == 0:
            print(f"apts_mpi.train: error: {error}", file=sys.stderr, flush=True)
        sys.exit(USAGE if isinstance(error, SharedInvalidInput) else FAILED)
    except Exception as error:
        # The other ranks are waiting for this one, or soon will be: end them all.
        if isinstance(error, StallError):
            # All ranks that wait know the same, at the same time.
            environment.pause(turn(world))
            end_job(world, f"apts_mpi.train: error: {error}")
        told = str(error) if isinstance(error, InvalidInput) else traceback.format_exc()
        end_job(world, f"apts_mpi.train: rank {world.rank} failed and ends the run:\n{told}")
    if status:
        sys.exit(status)


def train(arguments: Sequence[str], world: MPI.Intracomm) -> int:
    """Set up, train and report; return the exit status. Collective.

    Raises
    ------
    SharedInvalidInput
        On every rank, before any work, for input that cannot be used.
    SharedFailure
        On every rank, for what went wrong later.
    """
    comm = Communicator(world, Events())
    console = Console(quiet=comm.rank != 0)
    # --help and --print_config print and exit, on every rank.
    quiet = contextlib.nullcontext() if comm.rank == 0 else contextlib.redirect_stdout(io.StringIO())
    with comm.shared_errors(), quiet:
        options, config = parse(arguments)
    with Watch(world, options.stall_timeout or STALL_TIMEOUT):
        return run(arguments, options, config, comm, world, console)


def run(
    arguments: Sequence[str],
    options: TrainingOptions,
    config: str,
    comm: Communicator,
    world: MPI.Intracomm,
    console: Console,
) -> int:
    """What `train` does once the options are known. Collective."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals := StopSignals())
        tell = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
        checkpoint = open_earlier(options, comm, tell)
        if checkpoint is not None:
            stack.enter_context(checkpoint)
            with comm.shared_errors():
                options, config = parse(arguments, checkpoint.metadata.get("configuration", ""))
                options = same_subdomains(options, checkpoint)
        with comm.shared_errors():
            if options.tensorboard and comm.rank == 0:
                check_tensorboard()
        training = make_training(options, comm, world)
        if isinstance(training, StagedTraining):
            tell("\n".join(training.solver.holding.processes))
        if checkpoint is not None:
            for notice in training.load(checkpoint):
                tell(f"note: {notice}")
            tell(f"resumed after iteration {training.progress.iteration} from {checkpoint.path}")
        if options.view:
            tell(training.solver.describe())
        path = Path(comm.agree_on_text(str(run_directory(options, training.problem.name, checkpoint))))
        with comm.shared_errors():
            if comm.rank == 0:
                make_directory(path)
        # Rank 0's place, wherever the other ranks were started.
        place = Path(comm.agree_on_text(str((path / CHECKPOINTS).absolute())))
        checkpoints = stack.enter_context(
            CheckpointDirectory(place, comm, options.checkpoint_keep_last, options.checkpoint_keep_every)
        )
        directory = scalars = None
        with comm.shared_errors():
            if comm.rank == 0:
                in_place = goes_on_in(path, checkpoint)
                directory = RunDirectory(path, replaces(options, path, checkpoint), history_of(checkpoint), in_place)
                directory.write_config(config)
                if options.tensorboard:
                    scalars = ScalarWriter(path / TENSORBOARD, training.progress.iteration)
        if checkpoint is None:
            checkpoints.clear()
        else:
            checkpoint.close()
        metadata = {"configuration": config, "versions": environment.versions() | {"mpi": mpi_version()}}
        history = directory.history if directory is not None else bytes
        survival = Survival(training, checkpoints, options, signals, metadata, history, tell)
        trace = Trace(training.solver.events, training.comm) if options.trace else None
        with Reporter(training, directory, console, options.monitor, scalars) as reporter:
            metrics = training.run(reporter.record, survival.boundary)
        if trace is not None:
            trace.end()
    events = event_table(training.solver.events, training.batch_size, training.comm)
    summary = None if metrics is None else training.summary(metrics) | {"events": events}
    if directory is not None and summary is not None:
        directory.close(summary)
        print_summary(console, summary)
    if summary is not None and (warning := training.warning()):
        tell(f"warning: {warning}")
    if options.log_view:
        print_events(events, comm.size, console)
    if trace is not None:
        write_trace(trace, path / TRACE, tell)
    if summary is None:
        iteration = training.progress.iteration
        tell(f"stopped after iteration {iteration}, as {survival.stopped_by}: go on with --resume --run-dir {path}")
        return REQUEUE
    tell(f"records: {path}")
    return 0


def write_trace(trace: Trace, path: Path, tell: Callable[[str], None]) -> None:
    """Write what was traced. The run is at its end: it does not fail for a file that nothing needs. Collective."""
    try:
        dropped = trace.write(path)
    except InvalidInput as error:
        tell(f"warning: {error}")
        return
    if dropped:
        tell(f"note: {TRACE} is full and lacks the last {dropped} events; give fewer --max-iterations")


def make_training(options: TrainingOptions, comm: Communicator, world: MPI.Intracomm) -> Training:
    """The run that the options describe. Collective."""
    local_rank = comm.local_rank()
    make = functools.partial(
        build,
        options.problem,
        data_dir=options.data_dir,
        train_samples=options.train_samples,
        seed=options.seed,
        dtype=getattr(torch, options.dtype),
    )
    with comm.shared_errors():
        device = choose_device(options.device, local_rank)
        if device.type == "cuda" and MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            # torch calls what a backward pass starts from a thread of its own.
            raise InvalidInput(
                "device: 'cuda' needs an MPI library with MPI_THREAD_SERIALIZED, which this one does not give; "
                "choose --device cpu, or take another library"
            )
    # The other ranks wait for the trial, and their wait has a limit.
    limit = min(PROBE_LIMIT, 0.5 * (options.stall_timeout or STALL_TIMEOUT))
    use_transport(device, choose_transport(comm, device, options.transport, limit))
    with comm.shared_errors():
        problem = make() if options.layout == "replicated" else None
    if problem is None:
        return StagedTraining(build_staged_problem(make, options, world), options, device, world)
    return Training(problem, options, device, world)


class Reporter:
    """Shows and keeps the progress of a run, on rank 0: a bar on a terminal, plain lines elsewhere.

    Parameters
    ----------
    training
        The run.
    directory
        Where records go; None on the other ranks, which report nothing.
    console
        Where to print.
    monitor
        Whether to print a line an iteration.
    scalars
        Where records go as well, if any.
    """

    def __init__(
        self,
        training: Training,
        directory: RunDirectory | None,
        console: Console,
        monitor: bool,
        scalars: ScalarWriter | None,
    ) -> None:
        self._directory = directory
        self._scalars = scalars
        self._console = console
        self._monitor = monitor
        self._progress = Progress(console=console, disable=directory is None or not console.is_terminal)
        self._task = self._progress.add_task(
            "training", total=training.epochs * training.batches, completed=training.progress.accepted
        )

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._scalars is not None:
            self._scalars.close()

    def record(self, values: dict[str, Any]) -> None:
        """Take in one iteration or one epoch."""
        if self._directory is None:
            return
        self._directory.record(values)
        if self._scalars is not None:
            self._scalars.write(values)
        if "train_loss" in values:
            self._directory.flush()
            self._print(values)
        else:
            if self._monitor:
                self._print(values)
            self._progress.update(self._task, advance=float(values["accepted"]))

    def _print(self, values: dict[str, Any]) -> None:
        parts = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in values.items()
            if not isinstance(value, dict)
        ]
        self._console.print("  ".join(parts), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
