"""One run from its options to its summary: resumed or new, set up, trained, reported."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from mpi4py import MPI
from rich.console import Console

from apts_mpi.checkpoint import Checkpoint, CheckpointDirectory
from apts_mpi.errors import InvalidInput, SharedFailure
from apts_mpi.options.methods import describe_method
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.launcher import mpi_version
from apts_mpi.records.directory import TORCH_PROFILE, TRACE, RunDirectory, print_summary
from apts_mpi.tools import environment
from apts_mpi.tools.command import say
from apts_mpi.tools.memory import peak_of
from apts_mpi.tools.signals import StopSignals, name_of
from apts_mpi.tools.status import REQUEUE
from apts_mpi.train.checkpointing import Survival
from apts_mpi.train.device import take_device
from apts_mpi.train.log_view import event_table, print_events
from apts_mpi.train.logger import Logger, LoggerSetting
from apts_mpi.train.loggers import Loggers, chosen_loggers
from apts_mpi.train.options import TrainingOptions
from apts_mpi.train.parser import parse
from apts_mpi.train.profiler import TorchProfiler
from apts_mpi.train.progress import Pace, check_metadata, shares_of_limits
from apts_mpi.train.reporter import Reporter, console_for, is_live
from apts_mpi.train.resume import (
    CHECKPOINTS,
    goes_on_in,
    open_earlier,
    replaces,
    run_directory,
    saved_arguments,
    to_go_on,
)
from apts_mpi.train.same_run import Asked, same_run
from apts_mpi.train.saved_history import history_of
from apts_mpi.train.sequence import print_tasks
from apts_mpi.train.stopping import CONVERGED, Reason
from apts_mpi.train.trace import Trace
from apts_mpi.train.training import Training
from apts_mpi.train.unused import check_unused

# Shows a message, on rank 0.
Tell = Callable[[str], None]

MakeTraining = Callable[[TrainingOptions, torch.device, Communicator, MPI.Intracomm], Training]


@dataclass(frozen=True)
class Destinations:
    """Where a run writes.

    Attributes
    ----------
    path
        The run directory.
    checkpoints
        Those in it.
    records, loggers
        On rank 0, what takes the records.
    """

    path: Path
    checkpoints: CheckpointDirectory
    records: RunDirectory | None
    loggers: Loggers | None = None

    def history(self) -> bytes:
        """The records so far, on rank 0."""
        return b"" if self.records is None else self.records.history()

    def failure(self) -> str:
        """On rank 0: which logger has failed, and how; empty as long as none has."""
        return "" if self.loggers is None else self.loggers.failure

    def is_gone(self) -> bool:
        """On rank 0: whether the run directory is not there any more, or somebody else's."""
        return self.records is not None and self.records.is_gone()


def run(
    make_training: MakeTraining,
    signals: StopSignals,
    arguments: Sequence[str],
    options: TrainingOptions,
    config: str,
    comm: Communicator,
    world: MPI.Intracomm,
    console: Console,
) -> int:
    """Train, and return the exit status. Collective.

    Parameters
    ----------
    make_training
        See `apts_mpi.train.layouts.make_training`.
    signals
        What asks the run to stop.
    arguments, options, config
        Of the command line, and what `apts_mpi.train.parser.parse` makes of them.
    comm, world
        All ranks, for what is no part of the training and for the training.
    console
        Where to print; quiet on all ranks but rank 0.
    """
    console = console_for(options.progress, console)
    tell = functools.partial(say, console)
    with contextlib.ExitStack() as stack:
        checkpoint, given = open_earlier(options, comm, tell), options
        if checkpoint is not None:
            stack.enter_context(checkpoint)
            with comm.shared_errors():
                check_metadata(checkpoint)
                saved = saved_arguments(checkpoint, arguments)
                options, config = parse(arguments, saved)
                options, notes = same_run(Asked(given, parse(saved)[0], options), checkpoint, comm.size)
            for note in notes:
                tell(f"note: {note}")
        with comm.shared_errors():
            unused = check_unused(given, options)
            kinds = chosen_loggers(options) if comm.rank == 0 else {}
        for note in unused:
            tell(f"note: {note}")
        device = take_device(options, comm)
        training = make_training(options, device, comm, world)
        begin(training, checkpoint, options, tell)
        if number := stopped_early(signals, comm):
            tell(f"stopped before its iterations, as {name_of(number)} was received: start it again")
            return REQUEUE
        destinations = open_destinations(training, options, config, checkpoint, comm, stack, tell)
        destinations = open_loggers(destinations, kinds, training, config, comm, stack, tell)
        if options.keep_best and checkpoint is not None:
            find_best(training, destinations, tell)
        metadata = {"configuration": config, "versions": environment.versions() | {"mpi": mpi_version()}}
        survival = Survival(training, destinations.checkpoints, options, signals, metadata, destinations, tell)
        trace = Trace(training.solver.events, training.comm) if options.trace else None
        if options.log_view:
            training.solver.events.peak = peak_of(device)
        pace = Pace(lambda: shares_of_limits(options, training.progress, training.epochs, training.batches))
        records, loggers = destinations.records, destinations.loggers
        live, profiler = is_live(options.progress, console), TorchProfiler(options.torch_profiler)
        with Reporter(pace, records, console, live, options.monitor, loggers) as reporter, profiler:
            metrics = training.run(reporter.record, profiler.counting(survival.boundary), tell)
        if trace is not None:
            trace.end()
    failure = report(training, metrics, destinations, options.log_view, console)
    if trace is not None:
        write_trace(trace, destinations, training.comm, tell)
    if options.torch_profiler:
        write_profile(profiler, destinations, training.comm, tell)
    if metrics is None:
        iteration, path = training.progress.iteration, destinations.path
        stopped = f"{Reason.INTERRUPTED.value}: stopped after iteration {iteration}, as {survival.stopped_by}"
        tell(f"{stopped}: go on with {to_go_on(options, path)}")
        return REQUEUE
    if failure:
        raise SharedFailure(
            f"{failure}; the last checkpoint holds the trained network, and --resume --run-dir {destinations.path} "
            "writes what is missing"
        )
    tell(f"records: {destinations.path}")
    tell(ending(training))
    return 0


def ending(training: Training) -> str:
    """Why the run ended, on a line."""
    reason = training.reason
    assert reason is not None  # it has
    converged = "converged after" if reason in CONVERGED else "ended after"
    return f"{reason.value}: {converged} iteration {training.progress.iteration}: {reason.words}"


def stopped_early(signals: StopSignals, comm: Communicator) -> int:
    """Number of the signal that any rank has received so far, or 0. Collective."""
    return comm.largest(signals.received)[0]


def begin(training: Training, checkpoint: Checkpoint | None, options: TrainingOptions, tell: Tell) -> None:
    """Go on where the checkpoint left the run, and say what is to be said at its beginning. Collective."""
    if training.places:
        tell(training.places)
    for notice in training.notes if checkpoint is None else training.load(checkpoint):
        tell(f"note: {notice}")
    if checkpoint is not None:
        tell(f"resumed after iteration {training.progress.iteration} from {checkpoint.path}")
    if options.view:
        if options.optimizer == "apts":
            tell(describe_method(options.method, options))
        tell(training.solver.describe())


def open_destinations(
    training: Training,
    options: TrainingOptions,
    config: str,
    checkpoint: Checkpoint | None,
    comm: Communicator,
    stack: contextlib.ExitStack,
    tell: Tell,
) -> Destinations:
    """Make the run directory and what is in it; an earlier run's checkpoints are removed. Collective.

    Parameters
    ----------
    training, options, config
        The run.
    checkpoint
        That of the run which goes on; closed here, as it may be replaced from now on.
    comm
        All ranks. Not that of the training, whose messages are counted.
    stack
        Takes what is to be closed.
    tell
        Shows a message.
    """
    with comm.shared_errors():
        # Before anything is made: a checkpoint may hold no records.
        history = history_of(checkpoint) if comm.rank == 0 else b""
    with comm.shared_errors():
        path = run_directory(options, training.problem.name, checkpoint) if comm.rank == 0 else Path()
    path = Path(comm.agree_on_text(str(path)))
    # Rank 0's place, wherever the other ranks were started.
    place = Path(comm.agree_on_text(str((path / CHECKPOINTS).absolute())))
    checkpoints = CheckpointDirectory(place, comm, options.checkpoint_keep_last, options.checkpoint_keep_every)
    stack.enter_context(checkpoints)
    records = None
    with comm.shared_errors():
        if comm.rank == 0:
            in_place = goes_on_in(path, checkpoint)
            overwrite = replaces(options, path, checkpoint)
            records = RunDirectory(path, config, tell, overwrite, history, in_place)
            stack.enter_context(records)
    if checkpoint is None:
        checkpoints.clear()
    else:
        checkpoint.close()
    return Destinations(path, checkpoints, records)


def open_loggers(
    destinations: Destinations,
    kinds: dict[str, type[Logger]],
    training: Training,
    config: str,
    comm: Communicator,
    stack: contextlib.ExitStack,
    tell: Tell,
) -> Destinations:
    """The same with the loggers of these kinds, on rank 0; what cannot be made ends all ranks. Collective."""
    loggers = None
    with comm.shared_errors():
        if destinations.records is not None:
            earlier = [json.loads(line) for line in destinations.history().splitlines()]
            done, configuration = training.progress.iteration, yaml.safe_load(config)
            setting = LoggerSetting(destinations.path, done, earlier, configuration, tell)
            loggers = Loggers(kinds, setting)
            # Else they leave after they have been given the summary.
            stack.push(lambda kind, *_: loggers.close() if kind is not None else None)
    return replace(destinations, loggers=loggers)


def find_best(training: Training, destinations: Destinations, tell: Tell) -> None:
    """See that the link names the best checkpoint of a run that goes on, or say that it is not there. Collective."""
    step = training.stopping.state.best_iteration
    if not destinations.checkpoints.name_best(step or None) and step:
        tell(f"note: the best checkpoint so far, of iteration {step}, is not in {destinations.checkpoints.path}")


def report(
    training: Training, metrics: dict[str, Any] | None, destinations: Destinations, log_view: bool, console: Console
) -> str:
    """Write and print what the run came to; of one that was stopped, which has no metrics, the events alone.

    Collective. Returns why the summary is not written, empty if it is, or if there is none.
    """
    failure, of_loggers = "", {"reason": Reason.INTERRUPTED.value}
    events = event_table(training.solver.events, training.batch_size, training.comm)
    if metrics is not None:
        summary = training.summary(metrics) | {"events": events}
        of_loggers = summary
        if destinations.records is not None:
            failure = destinations.records.write_summary(summary)
            print_summary(console, summary)
            print_tasks(console, summary)
        if warning := training.warning():
            say(console, f"warning: {warning}")
    if destinations.loggers is not None:
        destinations.loggers.end(of_loggers)
        destinations.loggers.close()
        failure = failure or destinations.failure()
    if log_view:
        print_events(events, training.comm.size, console)
    return training.comm.agree_on_text(failure)


def write_trace(trace: Trace, destinations: Destinations, comm: Communicator, tell: Tell) -> None:
    """Write what was traced. The run is at its end: it does not fail for a file that nothing needs. Collective."""
    if comm.decide(lambda: [destinations.is_gone()])[0]:
        tell(f"warning: trace: {str(destinations.path)!r} is gone, or somebody else's, and gets no {TRACE}")
        return
    try:
        dropped = trace.write(destinations.path / TRACE)
    except InvalidInput as error:
        tell(f"warning: {error}")
        return
    if dropped:
        tell(f"note: {TRACE} is full and lacks the last {dropped} events; give fewer --max-iterations")


def write_profile(profiler: TorchProfiler, destinations: Destinations, comm: Communicator, tell: Tell) -> None:
    """Write what torch's profiler recorded, as `write_trace` does. Collective."""
    if comm.decide(lambda: [destinations.is_gone()])[0]:
        tell(f"warning: torch_profiler: {str(destinations.path)!r} is gone, or somebody else's, and gets no profile")
        return
    try:
        lacking = profiler.write(destinations.path / TORCH_PROFILE, comm)
    except InvalidInput as error:
        tell(f"warning: {error}")
        return
    if lacking:
        tell(f"note: {lacking} of {comm.size} ranks have no profile of torch's; it begins with the third iteration")
