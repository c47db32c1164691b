"""What a training run leaves on disk, for comparison with what another one left."""

import json

from apts_mpi.checkpoint import Checkpoint, resolve


def history(directory):
    """The records of a run, without the times."""
    lines = (directory / "history.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in ("seconds", "cpu_seconds")}
        for line in lines
    ]


def arrays(directory):
    """The newest checkpoint of a run, without its records, in which there are times."""
    with Checkpoint(resolve(directory / "checkpoints")) as checkpoint:
        checkpoint.verify()
        return {name: checkpoint.read(name).tobytes() for name in checkpoint.names if name != "training/history"}
