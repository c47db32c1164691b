"""``python -m apts_mpi.train``: training on all ranks of ``MPI.COMM_WORLD``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

from apts_mpi.tools.signals import StopSignals


def main(arguments: Sequence[str] | None = None) -> None:
    """Train; the process ends with a status that says how it went."""
    given = sys.argv[1:] if arguments is None else arguments
    with StopSignals() as signals:
        # Not above: torch and MPI take seconds, in which a signal is to count.
        from apts_mpi.tools.command import prints_version

        if prints_version(given):
            return
        from apts_mpi.train.command import carry_out
        from apts_mpi.train.layouts import make_training
        from apts_mpi.train.run import run

        signals.renew()
        status = carry_out(given, functools.partial(run, make_training, signals))
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
