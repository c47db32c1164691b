"""Which checkpoint a run goes on from, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from apts_mpi.checkpoint import Checkpoint, check_unclaimed, newest_valid, open_checkpoint
from apts_mpi.errors import InvalidInput, shown
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.records.directory import make_directory, make_new_directory
from apts_mpi.tools import environment
from apts_mpi.train.configuration import NULL, expand, given_options, read_text
from apts_mpi.train.options import LATEST_OF_RUN, TrainingOptions
from apts_mpi.train.parser import parse, spell

# Folder of the checkpoints in a run directory.
CHECKPOINTS = "checkpoints"

# Characters of a name that a message repeats.
LONGEST_NAME = 100

# Options that a resumed run does not have from its checkpoint, which describes the run and may be somebody's: where it
# writes and what may be replaced there, of which the call alone decides; what the machine has; and what the call is
# to show, how long it may last and how patient it is.
OF_THE_CALL = (
    *("run_dir", "overwrite", "resume"),
    *("device", "transport"),
    *("view", "monitor", "progress", "log_view", "trace", "torch_profiler", "tensorboard", "logger"),
    *("walltime", "stall_timeout"),
)

# Options that may name a program of the user's, MODULE:NAME, which a checkpoint cannot start.
PROGRAMS = ("problem", "network", "loss", "local.solver", "coarse.space")


def open_earlier(options: TrainingOptions, comm: Communicator, tell: Callable[[str], None]) -> Checkpoint | None:
    """Open the checkpoint to go on from; None for a new run. Collective.

    Parameters
    ----------
    options
        What was asked for.
    comm
        All ranks.
    tell
        Shows a message, on rank 0.

    Raises
    ------
    SharedInvalidInput
        If there is none at the place that was given, or none that can be used.
    """
    if options.resume is None:
        return None
    with comm.shared_errors():
        path = place(options)
    # Rank 0 looks, as a file system may show other ranks another moment, and others may have been started elsewhere.
    path = Path(comm.agree_on_text(str(path.absolute())))
    kind = comm.agree_on_text("file" if path.is_file() else "directory" if has_checkpoint(path) else "")
    if kind == "file":
        return open_checkpoint(path, comm)
    if kind == "" and options.resume == LATEST_OF_RUN:
        tell(f"{path} has no checkpoint yet: a new run begins")
        return None
    if options.resume == LATEST_OF_RUN:
        with comm.shared_errors():
            if comm.rank == 0:
                check_unclaimed(path)
    checkpoint, messages = newest_valid(path, comm)
    for message in messages:
        tell(f"warning: {message}")
    return checkpoint


def place(options: TrainingOptions) -> Path:
    """A checkpoint, or a directory where they are."""
    if options.resume == LATEST_OF_RUN:
        if options.run_dir is None:
            raise InvalidInput(
                "resume: 'latest' needs the directory of the run; give --run-dir, or the path of a checkpoint "
                "after --resume"
            )
        return Path(options.run_dir) / CHECKPOINTS
    assert options.resume is not None  # see `open_earlier`
    path = Path(options.resume)
    if not path.exists():
        raise InvalidInput(f"resume: {options.resume!r} does not exist; give a checkpoint, or the directory of a run")
    return path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path


def has_checkpoint(directory: Path) -> bool:
    """Whether there is a file that looks like one."""
    return any(directory.glob("step-*.h5"))


def saved_arguments(checkpoint: Checkpoint, arguments: Sequence[str]) -> list[str]:
    """What a checkpoint says of its run, as arguments before those of the command line.

    Parameters
    ----------
    checkpoint
        That of the run, validated by `apts_mpi.train.progress.check_metadata`.
    arguments
        Of the command line.

    Raises
    ------
    InvalidInput
        For a configuration that cannot be used, or that names programs or files which the command line does not.
    """
    text = checkpoint.metadata.get("configuration", "")
    place = f"{checkpoint.path}: configuration"
    saved = read_text(text, place) if text else []
    values = dict(argument[2:].split("=", 1) for argument in saved)
    given = given_options(expand(spell(arguments)))
    for name in PROGRAMS:
        if name not in given and ":" in (value := values.get(name, "")):
            raise InvalidInput(
                f"{name}: the checkpoint names {shown(value)}, which is a program of yours; give --{name} "
                f"{value if len(value) <= LONGEST_NAME and value.isprintable() else 'MODULE:NAME'} to run it"
            )
    if "data_dir" not in given and (value := values.get("data_dir", NULL)) != NULL:
        raise InvalidInput(
            f"data_dir: the checkpoint names {shown(value)}, which is not read because a file says so; give "
            "--data-dir with the place of the data"
        )
    taken = [f"--{name}={value}" for name, value in values.items() if name not in OF_THE_CALL]
    try:
        parse(taken)
    except InvalidInput as error:
        raise InvalidInput(f"{place}: {error}") from error
    return taken


def to_go_on(options: TrainingOptions, path: Path) -> str:
    """The options with which the run in directory ``path`` goes on: also those that no checkpoint can give."""
    programs = {"problem": options.problem, "local.solver": options.local.solver, "coarse.space": options.coarse.space}
    again = {name: value for name, value in programs.items() if ":" in value}
    if options.data_dir is not None:
        again["data_dir"] = options.data_dir
    return " ".join([f"--resume --run-dir {path}", *(f"--{name}={value}" for name, value in again.items())])


def run_directory(options: TrainingOptions, problem: str, checkpoint: Checkpoint | None) -> Path:
    """Make the directory that was asked for, that of the run which goes on, or a new one. For one rank alone.

    Raises
    ------
    InvalidInput
        If it cannot be made.
    """
    if options.run_dir is not None:
        return make_directory(Path(options.run_dir))
    if checkpoint is not None and checkpoint.path.parent.name == CHECKPOINTS:
        return make_directory(checkpoint.path.parent.parent)
    name = f"{problem.replace(':', '.')}-{options.optimizer}-{environment.timestamp()}"
    return make_new_directory(Path("runs") / name)


def replaces(options: TrainingOptions, path: Path, checkpoint: Checkpoint | None) -> bool:
    """Whether the records in directory ``path`` may be replaced: those of a run that goes on are kept in it."""
    if checkpoint is None:
        return options.overwrite or options.resume == LATEST_OF_RUN
    return options.overwrite or goes_on_in(path, checkpoint)


def goes_on_in(path: Path, checkpoint: Checkpoint | None) -> bool:
    """Whether the run that goes on is the one in directory ``path``."""
    return checkpoint is not None and checkpoint.path.resolve().parent == (path / CHECKPOINTS).resolve()
