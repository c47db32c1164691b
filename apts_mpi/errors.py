"""The error that a user can mend: it names the option, the bad value and the remedy."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args, get_origin, get_type_hints

import torch

# Seconds that a rank waits for others, unless the user says otherwise: longer than a checkpoint takes.
WAIT_LIMIT = 600.0


class InvalidInput(ValueError):
    """Input that cannot be used; the message alone, without a traceback, is enough to mend it."""


class SharedInvalidInput(InvalidInput):
    """The same, raised on all ranks together: each may leave in its own time, none waits for another."""


class SharedFailure(RuntimeError):
    """What went wrong while a run was under way, raised on all ranks together with one message."""


class StallError(RuntimeError):
    """A rank has not been heard of for too long; the message names it."""


class StageError(RuntimeError):
    """Something failed in a stage of a pipeline; the message names the stage, the cause is the error itself."""


@contextmanager
def named_failures(words: str, remedy: str) -> Iterator[None]:
    """Name what has to be chosen instead, where torch cannot differentiate.

    Parameters
    ----------
    words, remedy
        What the message says before and after torch's reason.

    Raises
    ------
    InvalidInput
        For an error of torch's, except for a lack of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InvalidInput(f"{words}, which failed ({reason}); {remedy}") from error


def require(condition: bool, option: str, value: object, remedy: str) -> None:
    """Raise `InvalidInput` naming ``option``, its bad ``value`` and the ``remedy`` unless ``condition`` holds."""
    if not condition:
        raise InvalidInput(f"{option}: {value!r} is not allowed; {remedy}")


def require_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise `InvalidInput` unless ``value`` is one of ``choices``."""
    require(value in choices, option, value, "choose one of " + ", ".join(choices))


def require_choices(options: object, prefix: str = "") -> None:
    """Raise `InvalidInput` for a value that is none of those which the type of its field names."""
    for name, kind in get_type_hints(type(options)).items():
        if get_origin(kind) is Literal:
            require_choice(prefix + name, getattr(options, name), get_args(kind))


def require_name(option: str, value: str, names: tuple[str, ...]) -> None:
    """Raise `InvalidInput` for what is neither one of ``names`` nor ``MODULE:NAME``."""
    remedy = f"choose one of {', '.join(names)}, or MODULE:CLASS for one of your own"
    require(value in names or re.fullmatch(r"[\w.]+:\w+", value) is not None, option, value, remedy)
