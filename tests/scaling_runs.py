"""Records of scaling studies that were not run, with figures that are known."""

import json
from dataclasses import replace

import yaml

from apts_mpi.scaling.calls import Exchanges, Machine
from apts_mpi.scaling.cost_fit import Point
from apts_mpi.scaling.cost_model import Shape, seconds_of, terms
from apts_mpi.scaling.measured import MeasuredRun
from apts_mpi.scaling.network import read_network

EVENT = {"calls": 4, "seconds_min": 1.0, "ratio": 1.0, "messages": 0, "bytes": 0, "gradient_evaluations": 1.0}

NETWORK = "fat-tree:12.5GB/s,1us"

MACHINE = Machine(read_network(NETWORK))

# Of a network with a million parameters: four buckets, two gathers and broadcasts.
EXCHANGES = Exchanges({"global evaluation": (4, 1e6), "judge": (4, 64.0)})

OPTIONS = {
    "layout": "replicated",
    "replicas": 1,
    "dtype": "float32",
    "coarse": {"model": "gauss-newton", "columns": ["correction", "last_step"]},
    "pipeline": {"micro_batches": 4},
}


def write_run(path, ranks, seconds, batch_size=100, **others):
    """The directory of a run of four iterations; the first is slow, as it is in truth."""
    path.mkdir()
    ends = [10.0 + number * seconds for number in range(4)]
    records = [{"iteration": number + 1, "seconds": end} for number, end in enumerate(ends)]
    records.append({"epoch": 1, "seconds": ends[-1], "train_loss": 0.5})
    (path / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "summary.json").write_text(json.dumps(summary(ranks, batch_size, ends[-1]) | others))
    (path / "config.yaml").write_text(yaml.safe_dump(OPTIONS | {"batch_size": batch_size, "run_dir": str(path)}))
    return str(path)


def summary(ranks, batch_size, seconds):
    events = {"judge": EVENT | {"seconds_max": 1.0, "share": 0.25}, "wait": EVENT | {"seconds_max": 3.0, "share": 0.75}}
    return {
        "problem": "digits", "optimizer": "apts", "parameters": 7, "train_loss": 0.5, "seconds": seconds,
        "ranks": ranks, "subdomains": ranks, "batch_size": batch_size, "iterations": 4,
        "seconds_in_communication": seconds / 4, "events": events,
    }  # fmt: skip


def shape_of(layout, kind, ranks, **others):
    """Sizes of a study up to eight ranks, of a network with a million parameters."""
    grown = (
        {"subdomains": ranks, "batch_size": 600 * ranks} if kind == "weak" else {"subdomains": 8, "batch_size": 4800}
    )
    activations = 512.0 if layout == "staged" else 0.0
    shape = Shape(layout, ranks, parameters=1_000_000, activation_bytes=activations, **grown | others)
    return shape if layout == "staged" else replace(shape, exchanges=EXCHANGES)


def point_of(shape, values):
    """What the model itself would measure."""
    parts = {name: seconds_of(amounts, values) for name, amounts in terms(shape, MACHINE).items()}
    events = {
        "global evaluation": 0.75 * parts["gradient evaluations"],
        "judge": 0.25 * parts["gradient evaluations"],
        "local solves": parts["local solves"],
        "coarse": parts["Jacobian products"] + parts["reduced model"],
    }
    return Point(shape, sum(parts.values()), events)


def record_of(kind, shape, values):
    """The same as the record of a run of four iterations."""
    point = point_of(shape, values)
    measured = {name: EVENT | {"seconds_max": 4 * seconds, "share": 0.2} for name, seconds in point.events.items()}
    sent = shape.activation_bytes * shape.batch_size * 4 if shape.ranks > 1 else 0
    measured["judge"]["bytes"] = sent
    for name, (count, size) in shape.exchanges.events.items():
        measured[name] |= {"messages": 4 * count, "bytes": 4 * count * size}
    found = summary(shape.ranks, shape.batch_size, 4 * point.seconds)
    found |= {"subdomains": shape.subdomains, "parameters": shape.parameters, "events": measured}
    options = OPTIONS | {"layout": shape.layout, "batch_size": shape.batch_size}
    return MeasuredRun(kind, (point.seconds,) * 3, found, yaml.safe_dump(options), shape.cores)
