"""The files that a plot is written to."""

from __future__ import annotations

from pathlib import Path

from apts_mpi.errors import InvalidInput

FORMATS = (".png", ".svg")


def files_of(out: Path) -> list[Path]:
    """The files to write.

    Raises
    ------
    InvalidInput
        For a format that is not known.
    """
    if not out.name:
        raise InvalidInput(f"out: {str(out)!r} names no file; give a name, such as plot.png")
    if out.suffix in FORMATS:
        return [out]
    # What follows a dot is a format if it could be one, and part of a name such as run-0.01 if not.
    if out.suffix[1:].isalpha():
        raise InvalidInput(f"out: {str(out)!r} is in a format that is not known; end it in .png or .svg, or in neither")
    return [out.with_name(out.name + end) for end in FORMATS]
