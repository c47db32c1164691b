"""``python -m apts_mpi.scaling run|report|predict|…``: scaling studies, and what follows for more ranks."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from apts_mpi.errors import InvalidInput, require
from apts_mpi.plot.files import files_of
from apts_mpi.records.directory import SUMMARY
from apts_mpi.scaling.calls import Machine
from apts_mpi.scaling.collectives import LIBRARIES
from apts_mpi.scaling.network import Network, read_network
from apts_mpi.scaling.report import measurement, print_shares, print_table, read_sources, rows, studies_of
from apts_mpi.scaling.studies import read_studies
from apts_mpi.tools.command import FILE_WIDTH, said_once, say
from apts_mpi.tools.parser import Parser, above_zero, whole
from apts_mpi.tools.status import FAILED, USAGE
from apts_mpi.tools.streams import end_with_reader

# Where none is given: links of 100 Gbit/s; for GPUs of 400.
NETWORKS = ["fat-tree:12.5GB/s,1us", "dragonfly:12.5GB/s,1us"]
FAST = ["fat-tree:50GB/s,2us", "dragonfly:50GB/s,2us"]

TABLES = [1000, 10_000, 100_000]
GPUS = [64, 128, 256, 512, 1024, 2048, 4096]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command and its options; ends the process for ``--help`` and for arguments that are not known."""
    parser = Parser("apts_mpi.scaling", "Scaling studies.")
    made = parser.add_commands({name: description for name, (_, description) in COMMANDS.items()})
    made["run"].add_argument("kind", choices=("strong", "weak"), help="one batch at all sizes, or one that grows")
    made["run"].add_argument("file", type=Path, metavar="FILE", help="HDF5 file, made if it does not exist")
    made["run"].add_argument("--ranks", type=whole(1), nargs="+", required=True, metavar="N", help="sizes to measure")
    made["run"].add_argument("--repeats", type=whole(1), default=1, metavar="N", help="runs of each size (default: 1)")
    made["run"].add_argument("--samples-per-rank", type=whole(1), metavar="N", help="of a batch, in a weak study")
    made["report"].add_argument(
        "sources", nargs="+", type=Path, metavar="FILE|RUN", help="one HDF5 file, or directories of runs"
    )
    made["report"].add_argument(
        "--kind", choices=("strong", "weak"), help="study of the directories (default: strong if all have one batch)"
    )
    made["report"].add_argument("--hdf5", type=Path, metavar="FILE", help="also put the runs into an HDF5 file")
    made["predict"].add_argument("file", type=Path, metavar="FILE", help="HDF5 file of studies")
    made["simulate"].add_argument("file", type=Path, metavar="FILE", help="HDF5 file of studies")
    _add_ranks(made["simulate"], [64, 256, 1024], "sizes", least=2)
    _add_ranks(made["gpt"], GPUS, "GPUs")
    made["gpt"].add_argument(
        "--simulate", type=whole(1), nargs="+", default=[], metavar="N", help="GPUs to simulate, too"
    )
    made["gpt"].add_argument(
        "--network", nargs="+", default=FAST, metavar="NETWORK", help=f"(default: {' '.join(FAST)})"
    )
    made["gpt"].add_argument("--mpi", choices=tuple(LIBRARIES), default="mpich", help="(default: mpich)")
    _add_ranks(made["root"], TABLES, "sizes")
    _add_subdomains(made["subdomains"])
    made["network"].add_argument("file", type=Path, metavar="FILE", help="machine file to write, JSON")
    for name in ("predict", "simulate"):
        _add_machine(made[name], several=name == "simulate")
    for name in ("report", "predict", "simulate", "subdomains"):
        made[name].add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    for name in ("report", "predict"):
        made[name].add_argument("--plot", type=Path, metavar="NAME", help="also draw NAME.png and NAME.svg")
    return parser.parse_args(arguments)


def _add_ranks(parser: Parser, default: list[int], words: str, least: int = 1) -> None:
    words = f"{words} (default: {' '.join(map(str, default))})"
    parser.add_argument("--ranks", type=whole(least), nargs="+", default=default, metavar="N", help=words)


def _add_machine(parser: Parser, several: bool) -> None:
    words = "TOPOLOGY:BANDWIDTH,LATENCY (flat, fat-tree, dragonfly), or a machine file"
    default = NETWORKS if several else NETWORKS[:1]
    given = {"nargs": "+", "default": default} if several else {"nargs": 1, "default": default}
    parser.add_argument("--network", metavar="NETWORK", help=f"{words} (default: {' '.join(default)})", **given)
    parser.add_argument(
        "--measured-on", metavar="NETWORK", help="of the machine of the studies (default: the first of --network)"
    )
    parser.add_argument("--mpi", choices=tuple(LIBRARIES), default="mpich", help="whose algorithms (default: mpich)")


def _add_subdomains(parser: Parser) -> None:
    lists: tuple[tuple[str, list[int], int, str], ...] = (
        ("--layers", [32, 64], 3, "layers of the networks"),
        ("--subdomains", [2, 4, 8, 16, 32, 64], 1, "of those that have as many layers"),
        ("--largest", [], 2, "values of coarse.largest, besides null"),
    )
    kinds = ("plain", "residual")
    parser.add_argument("--networks", nargs="+", choices=kinds, default=["residual"], help="(default: residual)")
    for name, default, least, words in lists:
        words = f"{words} (default: {' '.join(map(str, default)) or 'none'})"
        parser.add_argument(name, type=whole(least), nargs="+", default=default, metavar="N", help=words)
    parser.add_argument("--width", type=whole(1), default=64, metavar="N", help="of the networks (default: 64)")
    parser.add_argument("--loss", type=above_zero, default=0.1, help="of all training samples (default: 0.1)")
    parser.add_argument("--most", type=whole(1), default=300, metavar="N", help="iterations, at most (default: 300)")


def _machines(options: argparse.Namespace) -> tuple[list[Machine], Machine]:
    """Those to predict, and that of the studies."""
    machines = [Machine(read_network(given), options.mpi) for given in options.network]
    given = options.measured_on
    return machines, machines[0] if given is None else Machine(read_network(given), options.mpi)


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure what is missing."""
    # Of the solver and of MPI, without which the other commands work.
    from apts_mpi.scaling.runs import Study, run_study

    study = Study(
        kind=options.kind,
        ranks=tuple(dict.fromkeys(options.ranks)),
        repeats=options.repeats,
        samples_per_rank=options.samples_per_rank,
        arguments=tuple(options.arguments),
    )
    run_study(study, options.file, lambda line: say(console, line))
    say(console, f"studies: {options.file}")
    return 0


def report(options: argparse.Namespace, console: Console) -> int:
    """Print the tables of all studies; the status is 1 if a run did not come to its end."""
    runs, unfinished = read_sources(options.sources, options.kind)
    tables = {name: rows(list(map(measurement, own))) for name, own in studies_of(runs).items()}
    if options.hdf5 is not None:
        from apts_mpi.scaling.adding import add_runs

        add_runs(options.hdf5, runs)
    for name, table in tables.items():
        print_table(name, table, console)
        print_shares(name, table, console)
    for path in unfinished:
        say(console, f"{path} has no {SUMMARY}: it did not come to its end")
    (first, *_) = tables.values()
    write_json(options.json, {"sizes": first, "studies": tables, "unfinished": [str(path) for path in unfinished]})
    if options.plot is not None:
        from apts_mpi.scaling.plots import plot_report

        plot_report(tables, files_of(options.plot))
    return FAILED if unfinished else 0


def predict(options: argparse.Namespace, console: Console) -> int:
    """Fit and extrapolate."""
    from apts_mpi.scaling.predict import as_json, print_prediction
    from apts_mpi.scaling.predict import predict as predict_studies

    (machine,), measured_on = _machines(options)
    prediction = predict_studies(read_studies(options.file), machine, measured_on)
    print_prediction(prediction, console)
    write_json(options.json, as_json(prediction))
    if options.plot is not None:
        from apts_mpi.scaling.plots import plot_prediction

        studies = {name: (points, prediction.shapes[name]) for name, points in prediction.points.items()}
        plot_prediction(studies, prediction.values, machine, files_of(options.plot))
    return 0


def simulate(options: argparse.Namespace, console: Console) -> int:
    """Fit, extrapolate, and simulate."""
    from apts_mpi.scaling.cost_fit import grown
    from apts_mpi.scaling.predict import predict as predict_studies
    from apts_mpi.scaling.simulate import compare, print_compared

    machines, measured_on = _machines(options)
    prediction = predict_studies(read_studies(options.file), machines[0], measured_on)
    studies = {
        name: [grown(points[-1].shape, name.split(", ")[0], ranks) for ranks in options.ranks]
        for name, points in prediction.points.items()
    }
    found = compare(studies, prediction.values, machines)
    print_compared(found, console)
    write_json(options.json, [asdict(one) | {"error": one.error} for one in found])
    return 0


def gpt(options: argparse.Namespace, console: Console) -> int:
    """A model that nobody has run, from counted operations and a stated machine."""
    from apts_mpi.scaling.gpt import GPT, GPU, LAYOUTS, print_paper, shape_of, values_of
    from apts_mpi.scaling.simulate import compare, print_compared

    machines = [Machine(read_network(given), options.mpi) for given in options.network]
    model, gpu = GPT(), GPU()
    print_paper(model, gpu, sorted(options.ranks), machines[0], console)
    if options.simulate:
        shapes = {layout: [shape_of(model, layout, ranks) for ranks in options.simulate] for layout in LAYOUTS}
        print_compared(compare(shapes, values_of(model, gpu), machines), console)
    return 0


def subdomains(options: argparse.Namespace, console: Console) -> int:
    """Train deep networks with more and more subdomains."""
    from apts_mpi.scaling.subdomains import as_json, measure, print_series

    require(
        min(options.subdomains) <= min(options.layers),
        "subdomains",
        options.subdomains,
        f"give one at least of {min(options.layers)} or less, the layers of a network",
    )
    found = list(measure(options))
    print_series(found, options.loss, console)
    write_json(options.json, as_json(found))
    return 0


def root(options: argparse.Namespace, console: Console) -> int:
    """Time operations on tables of many ranks."""
    from apts_mpi.scaling.root import print_operations

    print_operations(options.ranks, console)
    return 0


def network(options: argparse.Namespace, console: Console) -> int:
    """Measure latency and bandwidth. Collective."""
    from apts_mpi.parallel.micro_benchmark import Measured, measure

    def keep(measured: Measured) -> None:
        found = Network("flat", measured.bandwidth, measured.latency)
        write_json(options.file, asdict(found))
        say(console, f"{found}, and {1e6 * measured.call:.3g} us a call from Python without a message: {options.file}")

    measure(keep)
    return 0


def write_json(path: Path | None, values: Any) -> None:
    """Write figures to a file, if one was given."""
    if path is None:
        return
    try:
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"json: {str(path)!r} cannot be written ({error}); give another file") from error


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace, Console], int], str]] = {
    "run": (run, "measure on this machine what FILE has not yet; what follows -- goes to apts_mpi.train"),
    "report": (report, "speed-up, efficiency and the share of each event of finished runs"),
    "predict": (predict, "fit a cost model and say what limits first on the way to 10,000 ranks"),
    "simulate": (simulate, "what is predicted beside a simulation by SimGrid"),
    "gpt": (gpt, "memory, seconds and messages of a GPT of a billion parameters on 64 to 4,096 GPUs, on paper"),
    "subdomains": (subdomains, "iterations to a loss as deep networks are cut into more subdomains, on one process"),
    "root": (root, "time what one rank does with the tables of all in an iteration, beside a budget of 1 ms"),
    "network": (network, "measure the network of a job, for predict --measured-on; start it with mpirun"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exit status 1 if a run did not come to its end, 2 for input that cannot be used."""
    end_with_reader()
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What follows belongs to another program, whatever it looks like.
    end = given.index("--") if "--" in given else len(given)
    with said_once():
        options = parse(given[:end])
    options.arguments = given[end + 1 :]
    try:
        if options.arguments and options.command != "run":
            raise InvalidInput("arguments after -- are for run alone; leave them out")
        console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
        carry_out, _ = COMMANDS[options.command]
        status = carry_out(options, console)
    except InvalidInput as error:
        with said_once():
            print(f"apts_mpi.scaling: error: {error}", file=sys.stderr)
        sys.exit(USAGE)
    sys.exit(status)


if __name__ == "__main__":
    main()
