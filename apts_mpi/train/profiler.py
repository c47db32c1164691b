"""What torch's own profiler sees of some iterations, a file a rank, beside the events of the method in `Trace`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import profile, schedule

from apts_mpi.errors import InvalidInput
from apts_mpi.parallel.communicator import Communicator

# Iterations before those that are recorded: the first one is unlike the others, in the second the profiler warms up.
BEFORE = 2


class TorchProfiler:
    """Records the operations of torch on this rank while it is entered; of no iterations it does nothing.

    Parameters
    ----------
    iterations
        How many to record, after the first two.
    """

    def __init__(self, iterations: int) -> None:
        self._iterations = iterations
        self._profile: profile | None = None
        self._content = b""

    def __enter__(self) -> TorchProfiler:
        if self._iterations:
            chosen = schedule(skip_first=BEFORE - 1, wait=0, warmup=1, active=self._iterations, repeat=1)
            self._profile = profile(schedule=chosen, on_trace_ready=self._keep)
            self._profile.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._profile is not None:
            self._profile.stop()

    def counting(self, boundary: Callable[[bool], bool]) -> Callable[[bool], bool]:
        """The same function, called after each iteration, by which iterations are counted here."""
        if self._profile is None:
            return boundary
        step = self._profile.step

        def count(done: bool) -> bool:
            step()
            return boundary(done)

        return count

    def _keep(self, recorded: profile) -> None:
        """Take what was recorded; nothing where there is no room, for which no run is to fail."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json.gz"
                recorded.export_chrome_trace(str(path))
                self._content = path.read_bytes()
        except (OSError, RuntimeError):
            self._content = b""

    def write(self, directory: Path, comm: Communicator) -> int:
        """Write a file of each rank, on rank 0; return the number of ranks without one. Collective.

        Raises
        ------
        InvalidInput
            On rank 0 alone, if they cannot be written.
        """
        lacking = comm.total(int(not self._content))
        failure: OSError | None = None
        # To the end, whatever happens: the other ranks wait until theirs is taken.
        for rank, content in enumerate(comm.in_turn(self._content)):
            try:
                if content and failure is None:
                    directory.mkdir(exist_ok=True)
                    (directory / f"rank-{rank}.json.gz").write_bytes(content)
            except OSError as error:
                failure = error
        if failure is not None:
            raise InvalidInput(
                f"torch_profiler: {str(directory)!r} cannot be written ({failure.strerror}); give another run_dir"
            )
        return lacking
