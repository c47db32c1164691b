"""``python -m apts_mpi.checkpoint info|verify|diff|to-…|from-…``: look at checkpoints and convert them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from apts_mpi.checkpoint.arrays import Array, Slab
from apts_mpi.checkpoint.directory import resolve
from apts_mpi.checkpoint.format import Checkpoint
from apts_mpi.checkpoint.saving import explained
from apts_mpi.checkpoint.values import check_finite
from apts_mpi.checkpoint.writers import write_file
from apts_mpi.errors import InvalidInput, shortened
from apts_mpi.tools.command import FILE_WIDTH, say
from apts_mpi.tools.parser import Parser
from apts_mpi.tools.streams import end_with_reader

# Exit statuses: files are damaged or differ; the command cannot be carried out.
FOUND, ERROR = 1, 2

# What of a checkpoint makes the `state_dict` of a network.
PARAMETERS = "parameters/"
STATE = (PARAMETERS, "buffers/")

# Before their names, those of the average.
AVERAGE = "average/"

# Characters of one metadata value that are shown.
SHOWN = 60


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command and its files; ends the process for ``--help`` and for arguments that are not known."""
    parser = Parser("apts_mpi.checkpoint", "A FILE may be a directory of checkpoints: its latest is meant.")
    made = parser.add_commands({name: command.description for name, command in COMMANDS.items()})
    for name, command in COMMANDS.items():
        made[name].add_argument("files", nargs=command.files, metavar=command.metavar, type=Path)
        if name in ("to-torch", "to-safetensors"):
            made[name].add_argument("--average", action="store_true", help="Those of the average of the iterates.")
    return parser.parse_args(arguments)


def info(console: Console, files: Sequence[Path]) -> int:
    """Show what is in each file."""
    for path in map(resolve, files):
        with Checkpoint(path) as checkpoint:
            table = Table()
            for heading in ("array", "shape", "dtype"):
                table.add_column(heading)
            for name in checkpoint.names:
                table.add_row(name, str(checkpoint.shape(name)), str(checkpoint.dtype(name)))
            say(console, f"{path}, step {checkpoint.step}")
            console.print(table)
            for key, value in checkpoint.metadata.items():
                # As JSON has it, a name shows nothing but its characters.
                say(console, f"{shortened(json.dumps(key)[1:-1], SHOWN)}: {shortened(json.dumps(value), SHOWN)}")
    return 0


def verify(console: Console, files: Sequence[Path]) -> int:
    """Read everything in each file."""
    status = 0
    for path in map(resolve, files):
        try:
            with Checkpoint(path) as checkpoint:
                checkpoint.verify()
                for name in checkpoint.names:
                    if name.startswith(PARAMETERS):
                        check_finite(path, name, checkpoint.read(name))
            say(console, f"{path}: ok")
        except InvalidInput as error:
            say(console, str(error))
            status = FOUND
    return status


def diff(console: Console, files: Sequence[Path]) -> int:
    """Show the arrays in which two files differ."""
    paths = [resolve(path) for path in files]
    with Checkpoint(paths[0]) as first, Checkpoint(paths[1]) as second:
        first.verify()
        second.verify()
        lines = []
        for name in dict.fromkeys(first.names + second.names):
            missing = [str(checkpoint.path) for checkpoint in (first, second) if name not in checkpoint.names]
            difference = f"not in {missing[0]}" if missing else compare(first, second, name)
            if difference:
                lines.append(f"{name}: {difference}")
    for line in lines:
        say(console, line)
    return FOUND if lines else 0


def compare(first: Checkpoint, second: Checkpoint, name: str) -> str:
    """How an array differs between two checkpoints, "" if not at all."""
    for what in (Checkpoint.shape, Checkpoint.dtype):
        if what(first, name) != what(second, name):
            return f"{what.__name__} {what(first, name)} and {what(second, name)}"
    values, others = first.read(name), second.read(name)
    if values.tobytes() == others.tobytes():
        return ""
    wide = np.complex128 if values.dtype.kind == "c" else np.float64
    return f"largest difference {np.abs(values.astype(wide) - others.astype(wide)).max():.6g}"


def to_torch(console: Console, files: Sequence[Path], average: bool = False) -> int:
    """Write the tensors of a network, or of its average, for ``torch.load(OUT, weights_only=True)``."""
    return convert(console, files, average, torch.save)


def to_safetensors(console: Console, files: Sequence[Path], average: bool = False) -> int:
    """Write them as a file of safetensors, under the names that they have in the network."""
    write = safetensors().save_file
    # transformers refuses files that do not say so.
    return convert(console, files, average, lambda state, path: write(state, path, metadata={"format": "pt"}))


def convert(
    console: Console, files: Sequence[Path], average: bool, write: Callable[[dict[str, torch.Tensor], Path], object]
) -> int:
    """Write the tensors of the network in a checkpoint by a function of them and a path."""
    source, target = resolve(files[0]), files[1]
    with Checkpoint(source) as checkpoint:
        checkpoint.verify()
        state = {
            name.removeprefix(prefix): as_tensor(checkpoint, name)
            for prefix in ((AVERAGE + kind if average else kind) for kind in STATE)
            for name in checkpoint.names
            if name.startswith(prefix)
        }
    if not state and average:
        raise InvalidInput(
            f"{source} has no average; give the checkpoint of a run with --average, or leave that out here"
        )
    if not state:
        raise InvalidInput(f"{source} has neither parameters nor buffers; give the checkpoint of a network")
    with replaced(target) as temporary:
        write(state, temporary)
    say(console, f"{target}: {len(state)} tensors")
    return 0


def safetensors() -> Any:
    """The package's functions for torch, or `InvalidInput` where it is not installed."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise InvalidInput("safetensors is not installed; pip install safetensors, or use torch's files") from error
    return safetensors.torch


def as_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """An array for torch, or `InvalidInput` where that lacks its type."""
    values = checkpoint.read(name)
    try:
        return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))
    except TypeError as error:
        raise InvalidInput(f"{checkpoint.path}: {name} is {values.dtype}, which torch lacks; leave it out") from error


def from_torch(console: Console, files: Sequence[Path]) -> int:
    """Write a checkpoint with the tensors of a ``state_dict`` as parameters."""
    source = files[0]
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InvalidInput(f"{source} cannot be read as a state_dict ({first_line(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise InvalidInput(f"{source} holds more than tensors by name; save network.state_dict() alone")
    return save_state(console, state, *files)


def from_safetensors(console: Console, files: Sequence[Path]) -> int:
    """Write a checkpoint with the tensors of a file of safetensors as parameters."""
    read = safetensors().load_file
    try:
        state = read(files[0])
    except Exception as error:
        raise InvalidInput(f"{files[0]} cannot be read as safetensors ({first_line(error)})") from error
    return save_state(console, state, *files)


def save_state(console: Console, state: dict[str, torch.Tensor], source: Path, target: Path) -> int:
    """Write tensors by name as parameters of a checkpoint."""
    arrays = []
    for name, tensor in state.items():
        try:
            values = tensor.detach().numpy()
        except TypeError as error:
            raise InvalidInput(f"{source}: {name} is {tensor.dtype}, which numpy lacks; convert it first") from error
        arrays.append(Array(f"parameters/{name}", values.shape, values.dtype, [Slab(0, values)]))
    with replaced(target) as temporary:
        write_file(temporary, arrays)
    say(console, f"{target}: {len(arrays)} arrays")
    return 0


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary file in the block, which then gets its name if the block came to its end."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explained(path.parent):
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def first_line(error: Exception) -> str:
    """The message of an error, which torch follows with pages of advice."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class Command(NamedTuple):
    """What a command does, how many files it takes, what they are called, and what it is for."""

    carry_out: Callable[..., int]
    files: str | int
    metavar: Any
    description: str


COMMANDS = {
    "info": Command(info, "+", "FILE", "Show the arrays and the metadata."),
    "verify": Command(verify, "+", "FILE", "Compare all checksums; exit status 1 if a file is damaged."),
    "diff": Command(diff, 2, "FILE", "Compare the arrays of two checkpoints; exit status 1 if they differ."),
    "to-torch": Command(to_torch, 2, ("FILE", "OUT.pt"), "Save parameters and buffers as a state_dict for torch.load."),
    "from-torch": Command(from_torch, 2, ("IN.pt", "FILE"), "Save all tensors of a state_dict as parameters."),
    "to-safetensors": Command(
        to_safetensors, 2, ("FILE", "OUT.safetensors"), "Save parameters and buffers, as HuggingFace."
    ),
    "from-safetensors": Command(
        from_safetensors, 2, ("IN.safetensors", "FILE"), "Save all tensors of it as parameters."
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Carry out the command; the process ends with a status that says how it went."""
    end_with_reader()
    options = parse(arguments)
    try:
        width = None if sys.stdout.isatty() else FILE_WIDTH
        chosen = {"average": True} if getattr(options, "average", False) else {}
        status = COMMANDS[options.command].carry_out(
            Console(width=width, markup=False, highlight=False), options.files, **chosen
        )
    except InvalidInput as error:
        sys.stderr.write(f"apts_mpi.checkpoint: error: {error}\n")
        status = ERROR
    sys.exit(status)


if __name__ == "__main__":
    main()
