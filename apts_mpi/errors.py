"""The error that a user can mend: it names the option, the bad value and the remedy."""

import difflib
import math
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args, get_origin, get_type_hints

import torch

# Characters of a value that a message shows, and those that an option may have: as many as a path. And the largest
# whole number, which has 64 bits as those of MPI and torch have.
SHOWN, LONGEST, LARGEST = 100, 4096, 2**63 - 1

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


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is one for lack of memory, torch's on any device or Python's."""
    # On the host torch has no class for it.
    on_host = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_host or isinstance(error, torch.OutOfMemoryError | MemoryError)


def name_remedy(error: BaseException) -> None:
    """Add to an error for lack of memory which option takes less."""
    cause: BaseException | None = error
    while cause is not None and not lacks_memory(cause):
        cause = cause.__cause__
    if cause is not None:
        error.add_note(
            "micro_batch_size: there is no memory for as many samples at a time; give a smaller one, such as 64 "
            "(--micro-batch-size 64)"
        )


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
    except (RuntimeError, NotImplementedError) as error:
        if lacks_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise InvalidInput(f"{words}, which failed ({reason}); {remedy}") from error


def shown(value: object) -> str:
    """A value as messages show it: on one line, and of a long one the beginning."""
    try:
        text = _SHORTENED.repr(value)
    except ValueError:  # Python writes no numbers of thousands of digits
        text = f"a number of {value.bit_length() if isinstance(value, int) else 'many'} bits"
    return shortened(text)


def shortened(text: str, most: int = SHOWN) -> str:
    """The text, of a long one the beginning and dots."""
    return text if len(text) <= most else text[: most - 1] + "…"


_SHORTENED = reprlib.Repr()
_SHORTENED.maxlevel = 2
_SHORTENED.maxstring = _SHORTENED.maxother = _SHORTENED.maxlong = SHOWN


def require(condition: bool, option: str, value: object, remedy: str) -> None:
    """Raise `InvalidInput` naming ``option``, its bad ``value`` and the ``remedy`` unless ``condition`` holds."""
    if not condition:
        raise InvalidInput(f"{option}: {shown(value)} is not allowed; {remedy}")


def require_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise `InvalidInput` unless ``value`` is one of ``choices``."""
    require(value in choices, option, value, "choose one of " + ", ".join(choices) + nearest(value, choices))


def nearest(value: object, choices: Iterable[str]) -> str:
    """A question after the choice that may have been meant; nothing where none is like the value."""
    found = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.7)
    return f"; did you mean {found[0]}?" if found else ""


def require_fields(options: object, prefix: str = "") -> None:
    """Raise `InvalidInput` for what no option may be.

    That is a value which is none of those that the type of its field names, a number that is not finite or too large,
    and a text that is empty or longer than any path.
    """
    for name, kind in get_type_hints(type(options)).items():
        value = getattr(options, name)
        if get_origin(kind) is Literal:
            require_choice(prefix + name, value, get_args(kind))
        if isinstance(value, float):
            require(math.isfinite(value), prefix + name, value, "give a finite number")
        if isinstance(value, int):
            require(-LARGEST <= value <= LARGEST, prefix + name, value, "give a number of 64 bits")
        if isinstance(value, str):
            require(bool(value), prefix + name, value, "give a text that is not empty, or leave it out")
            require(len(value) <= LONGEST, prefix + name, value, f"give at most {LONGEST} characters")


def require_name(option: str, value: str, names: tuple[str, ...]) -> None:
    """Raise `InvalidInput` for what is neither one of ``names`` nor ``MODULE:NAME``."""
    remedy = f"choose one of {', '.join(names)}, or MODULE:CLASS for one of your own{nearest(value, names)}"
    require(value in names or re.fullmatch(r"[\w.]+:\w+", value) is not None, option, value, remedy)
