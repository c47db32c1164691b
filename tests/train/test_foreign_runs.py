"""A run that goes on from somebody else's checkpoint: it describes the run as values, and decides of nothing else."""

import copy
import json
import random
import resource
import shutil
import zlib

import h5py
import networks
import numpy as np
import pytest
import torch
from foreign_files import as_hdf5, change_metadata, change_text, put, set_array
from mpi4py import MPI
from processes import PROBLEM, SMALL

from apts_mpi.checkpoint import Checkpoint, __main__, resolve
from apts_mpi.errors import InvalidInput
from apts_mpi.options import APTSOptions, CoarseOptions, GlobalStepOptions
from apts_mpi.train.__main__ import main
from apts_mpi.train.configuration import NAMES
from apts_mpi.train.options import PEERS, TrainingOptions
from apts_mpi.train.resume import OF_THE_CALL

USAGE = 2

# K-FAC with statistics, pairs of the global step, the last correction: all that a checkpoint may hold.
FULL = (
    f"{PROBLEM} --dtype=float64 --device=cpu --epochs=9 --batch-size=30 --subdomains=3 --max-iterations=3 "
    "--coarse.columns=[correction,last_step,last_correction] --global-step=lsr1"
).split()

RUNS = {
    "full": FULL,
    "lsr1": [*FULL, "--local.solver=lsr1"],
    "gauss-newton": [*FULL, "--local.solver=gauss-newton"],
    "adam-local": [*SMALL, "--epochs=9", "--max-iterations=3", "--local.solver=adam"],
    "adam": [*SMALL, "--epochs=9", "--max-iterations=3", "--optimizer=adam"],
    "sgd": [*SMALL, "--epochs=9", "--max-iterations=3", "--optimizer=sgd"],
    "lbfgs": [*SMALL, "--epochs=9", "--max-iterations=3", "--optimizer=lbfgs"],
    **{name: [*SMALL, "--epochs=9", "--max-iterations=3", f"--optimizer={name}"] for name in PEERS},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function of the name of a run that gives its checkpoint, which is not to be changed."""
    directory, made = MPI.COMM_WORLD.bcast(tmp_path_factory.mktemp("saved")), {}

    def save(name):
        if name not in made:
            main([*RUNS[name], f"--run-dir={directory / name}"])
            made[name] = resolve(directory / name / "checkpoints")
        return made[name]

    return save


@pytest.fixture
def foreign(world, saved, directory):
    """A function of the name of a run that gives a copy of its checkpoint, in the current directory."""

    def copied(name="full"):
        path, original = directory / "step-00000003.h5", saved(name)
        if world.rank == 0:
            # On several ranks it may have parts.
            parts = original.with_suffix(".parts")
            if parts.exists():
                shutil.copytree(parts, path.with_suffix(".parts"), dirs_exist_ok=True)
            shutil.copy(original, path)
        world.Barrier()
        return path

    return copied


@pytest.fixture
def refusal(command, directory):
    """A function that resumes a checkpoint, which is refused, and gives the one line that says why."""

    def call(path, *arguments):
        before = sorted(directory.rglob("*"))
        status, output, errors = command(PROBLEM, f"--resume={path}", "--run-dir=new", "--max-iterations=5", *arguments)
        assert (status, errors.count("\n"), "Traceback" in errors) == (USAGE, 1, False), output + errors
        assert errors.startswith("apts_mpi.train: error: ") and len(errors) < 1200 and errors[:-1].isprintable()
        assert [path for path in sorted(directory.rglob("*")) if path.name != "new"] == before
        return errors

    return call


# What the metadata say

WRONG = {
    # of the run
    ("run",): ({}, 5, [], None),
    ("run", "seed"): (..., "0", -1, 2.5, True, 10**30),
    ("run", "problem"): (..., None, ["networks:problem"], "x" * 10**6, "a\nb"),
    ("run", "more"): (1,),
    ("progress",): (..., [], None, {}, "x"),
    ("progress", "epoch"): (..., 0, -1, "1", 1.5, None, True, 10**30),
    ("progress", "batch"): (-1, 2, 10**9, [0]),
    ("progress", "tries"): (-1, 4, 10**9),
    ("progress", "iteration"): (-1, 1e3, 10**30),
    ("progress", "accepted"): (-5, None),
    ("progress", "seconds"): (-1.0, "0", float("nan"), float("inf"), None),
    ("progress", "gradient_evaluations"): (-1.0, float("inf")),
    ("progress", "more"): (1,),
    ("configuration",): (5, [], None, {"epochs": 3}),
    ("versions",): (5,),
    ("more",): (1,),
    # of the solver
    ("solver",): (..., [], None, 5),
    ("solver", "more"): (1,),
    ("solver", "state"): (..., [], None, {}),
    ("solver", "state", "iteration"): (..., -1, "3", 10**30, None),
    ("solver", "state", "functions"): (-1, 10**30, 1.5),
    ("solver", "state", "radius"): (0.0, -1.0, float("nan"), float("inf"), "1", [1.0]),
    ("solver", "state", "losses"): (None, ["x"], [float("nan")], {}),
    ("solver", "state", "more"): (1,),
    ("solver", "evaluated"): (..., 1, "true", None),
    ("solver", "differentiated"): (..., 0, []),
    ("solver", "correction"): (5, {"array": 5}, {"array": "no"}, {"array": ["x"]}, {"array": "x", "a": 1}),
    ("solver", "coarse"): (5, [], {}, "x"),
    ("solver", "coarse", "raised"): (..., 0.0, -4.0, float("nan"), "1"),
    ("solver", "coarse", "last_step"): (..., None, {"array": "no"}, {"array": "parameters/0.weight"}, {"array": {}}),
    ("solver", "coarse", "last_correction"): (..., {"array": "parameters/0.bias"}),
    ("solver", "coarse", "space"): (5, {}, {"name": 5, "state": {}}, {"name": "subdomains", "state": []}),
    ("solver", "global_step"): (5, [1], "x", {"function": 1}),
    ("solver", "global_step", "function"): (..., -1, "1"),
    ("solver", "global_step", "gamma"): (..., None, "1", []),
    ("solver", "global_step", "values"): (..., None, {"array": "parameters/0.weight"}),
    ("solver", "global_step", "steps"): (..., None, [], [1], {"array": "solver/global_step/values"}),
    ("solver", "subdomains"): (..., None, {}, [], [5], ["x"], [{}]),
    ("solver", "subdomains", 0, "index"): (..., -1, 2, "0"),
    ("solver", "subdomains", 0, "start"): (-1, 10**9, None, 1),
    ("solver", "subdomains", 0, "owned_stop"): (..., 0, 10**9, 5),
    ("solver", "subdomains", 0, "more"): (1,),
    ("solver", "subdomains", 0, "numbers"): (..., None, [], {}, {"count": 1}),
    ("solver", "subdomains", 0, "numbers", "count"): (..., -1, "1", 1.5, None, 10**30),
    ("solver", "subdomains", 0, "numbers", "updates"): (-1, float("nan")),
    ("solver", "subdomains", 0, "vectors"): (None, {"x": "<f8"}, {"x": 5}, {"../x": "<f8"}),
    ("solver", "subdomains", 0, "layers"): (None, {}, [5], [{}]),
    ("solver", "subdomains", 0, "layers", 0): (...,),
    ("solver", "subdomains", 0, "layers", 0, "name"): ("no", 5, None),
    ("solver", "subdomains", 0, "layers", 0, "kind"): ("Unknown", 5, "SignedFactors" * 10**5),
    ("solver", "subdomains", 0, "layers", 0, "tensors"): ([], None, [[1, 2, 3]], [["x", "<f8"]], [[[11, 11], "<f8"]]),
    ("solver", "local_solver"): (..., None, 5, "a\nb"),
}  # fmt: skip


@pytest.mark.parametrize("place", WRONG, ids=lambda place: ".".join(map(str, place)))
def test_metadata_of_another_kind(foreign, refusal, place):
    """Of each place, another type, nothing, too much and too little; the line names the place or what is there."""
    for value in WRONG[place]:
        path = foreign()
        change_metadata(path, lambda metadata, value=value: put(metadata, place, value))
        message = refusal(path)
        named = [str(name) for name in place if not isinstance(name, int)]
        assert any(name in message for name in (named[-1], *named[-2:-1])), message


OF_OTHER_SOLVERS = [
    ("lsr1", ("numbers", "pairs"), (..., -1, 6, 10**12, 1.5, "2", 1)),
    ("lsr1", ("numbers", "gamma"), (..., None, "1")),
    ("lsr1", ("vectors", "step_0"), (..., "<f4", 5)),
    ("gauss-newton", ("numbers", "shift"), (..., None, [])),
    ("gauss-newton", ("numbers", "more"), (1,)),
    ("adam-local", ("numbers", "count"), (..., -5, 0.5, "1")),
    ("adam-local", ("vectors", "first_moment"), (..., "<f4")),
    ("adam-local", ("vectors", "more"), ("<f8",)),
]


@pytest.mark.parametrize(("name", "place", "values"), OF_OTHER_SOLVERS, ids=str)
def test_state_of_local_solvers_of_another_kind(foreign, refusal, name, place, values):
    for value in values:
        path = foreign(name)
        change_metadata(path, lambda found, value=value: put(found, ["solver", "subdomains", 0, *place], value))
        local = "adam" if name == "adam-local" else name
        assert place[-1] in refusal(path) or local in refusal(path) or "vectors" in refusal(path)


OF_OPTIMIZERS = [
    ("adam", ("iteration",), (..., -1, "3", None)),
    ("adam", ("optimizer",), (..., [], {}, 5)),
    ("adam", ("optimizer", "exp_avg"), (..., 1.0, {"array": "parameters/0.bias"})),
    ("adam", ("optimizer", "step"), (..., 1.0, {"array": "optimizer/exp_avg"})),
    ("adam", ("optimizer", "more"), (1,)),
    ("sgd", ("optimizer", "momentum_buffer"), (..., [], {"array": "no"})),
    ("lbfgs", ("optimizer", "old_dirs"), (..., [], [1], None, {"array": "optimizer/d"})),
    ("lbfgs", ("optimizer", "n_iter"), (..., -1, "x")),
    ("lbfgs", ("optimizer", "al"), ([1.0] * 500, "x")),
    ("lbfgs", ("optimizer", "d"), (None, {"array": "optimizer/t"})),
    ("schedule-free", ("left",), (..., None, {"array": "parameters/0.bias"})),
    ("schedule-free", ("optimizer", "parameters"), (..., [], [None, None], {})),
    (
        "schedule-free",
        ("optimizer", "parameters", 0, "z"),
        (..., None, {"array": "no"}, {"array": "parameters/0.bias"}),
    ),
    ("schedule-free", ("optimizer", "groups", 0, "weight_sum"), (..., -1.0, "1", None)),
    ("schedule-free", ("optimizer", "groups", 0, "train_mode"), (True,)),
    ("muon", ("optimizer", "groups"), (..., [], [{}, {}, {}], {})),
    ("muon", ("optimizer", "groups", 1, "step"), (-1, 0.5, None)),
    ("muon", ("optimizer", "parameters", 0, "exp_avg"), (1.0,)),
    ("muon", ("optimizer", "parameters", 0, "momentum_buffer"), (..., {"array": "parameters/0.bias"})),
    ("soap", ("optimizer", "parameters", 0, "Q"), (..., None, [], [[], []], [1.0, 1.0])),
    ("soap", ("optimizer", "parameters", 0, "GG"), ([{"array": "parameters/0.weight"}, []],)),
    ("soap", ("optimizer", "parameters", 0, "shampoo_beta"), (..., 2.0, "x")),
    ("soap", ("optimizer", "parameters", 0, "precondition_frequency"), (0, 1.5)),
    ("prodigy", ("optimizer", "groups", 0, "d"), (..., -1.0, None)),
    ("prodigy", ("optimizer", "groups", 0, "d_numerator"), (1.0, {"array": "optimizer/parameters/0/s"})),
    ("prodigy", ("optimizer", "parameters", 0, "p0"), (..., [])),
]


@pytest.mark.parametrize(("name", "place", "values"), OF_OPTIMIZERS, ids=str)
def test_state_of_optimizers_of_another_kind(foreign, refusal, name, place, values):
    for value in values:
        path = foreign(name)
        change_metadata(path, lambda metadata, value=value: put(metadata, ["solver", *place], value))
        assert f"{place[-1]}" in refusal(path)


def test_numbers_of_a_peer_before_its_first_step(foreign, trained):
    """They are not there, and the run begins with them."""
    path = foreign("schedule-free")
    change_metadata(path, lambda metadata: put(metadata, ["solver", "optimizer", "groups", 0, "step"], ...))
    trained(PROBLEM, f"--resume={path}", "--max-iterations=4")


ARRAYS = {
    "solver/coarse/last_step": (np.zeros(3), np.zeros(1315, np.float32), np.zeros((1315, 1)), np.array(1.0)),
    "solver/global_step/gradient": (np.zeros(0), np.zeros(1315, np.int64)),
    "solver/local/layers/0/0": (np.zeros((1, 3, 3)), np.zeros((2, 11, 11)), np.zeros((1, 11, 11), np.float32)),
    "parameters/0.weight": (np.zeros((10, 16)), np.zeros((16, 10), np.float32)),
    "training/history": (np.zeros((3, 3), np.uint8), np.zeros(5), np.zeros(0, np.uint8)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_another_shape_or_type(foreign, refusal, name):
    for values in ARRAYS[name]:
        path = foreign()
        set_array(path, name, values)
        assert name in refusal(path)


@pytest.mark.parametrize("name", [*ARRAYS, "buffers/none"])
def test_arrays_that_are_missing(foreign, refusal, name):
    path = foreign()
    if name == "buffers/none":
        set_array(path, name, np.zeros(3))
    else:
        with as_hdf5(path) as file:
            del file[name]
            group = name.rpartition("/")[0]
            if not len(file[group]):
                del file[group]
        change_text(path, "checkpoint/index", lambda index: index.update(
            arrays=[array for array in index["arrays"] if array["name"] != name]))  # fmt: skip
    assert name in refusal(path)


@pytest.mark.parametrize(("place", "value"), [((3, 4), np.nan), ((0, 0), np.inf)])
def test_parameters_that_are_not_finite(foreign, refusal, place, value):
    path = foreign()
    with as_hdf5(path) as file:
        file["parameters/0.weight"][place] = value
    assert f"parameters/0.weight has {value} at {list(place)}; give a checkpoint from before that" in refusal(path)


@pytest.mark.mpi
def test_failed_load_leaves_solver_and_network(world, foreign):
    """Whatever is wrong is found before anything is taken over."""
    options = APTSOptions(
        subdomains=3,
        coarse=CoarseOptions(columns=("correction", "last_step", "last_correction")),
        global_step=GlobalStepOptions(model="lsr1"),
    )
    path = world.bcast(foreign())
    solver = networks.make_solver(world, options)
    batch = networks.classified(60)
    solver.step(batch)
    state, values = copy.deepcopy(solver.state), solver.holding.objective.vector.values.clone()
    for place in (("state", "radius"), ("coarse", "raised"), ("subdomains", 2, "numbers", "count"), ("evaluated",)):
        with Checkpoint(path) as checkpoint:
            metadata = copy.deepcopy(checkpoint.metadata["solver"])
            put(metadata, place, -1.0)
            with pytest.raises(InvalidInput, match=str(place[-1])):
                solver.load(checkpoint, metadata)
        assert solver.state == state and torch.equal(solver.holding.objective.vector.values, values)


# What the configuration says


def set_options(path, **options):
    """More lines of the saved configuration."""

    def change(metadata):
        lines = metadata["configuration"].splitlines()
        kept = [line for line in lines if line.split(":")[0] not in options]
        metadata["configuration"] = "\n".join([*kept, *(f"{name}: {value}" for name, value in options.items())]) + "\n"

    change_metadata(path, change)


def test_checkpoint_does_not_say_where_to_write(foreign, directory, trained):
    """Nor that something may be replaced there."""
    trained(*SMALL, "--run-dir=mine")
    before = {path: path.read_bytes() for path in (directory / "mine").rglob("*") if path.is_file()}
    path = foreign()
    set_options(path, run_dir="mine", overwrite="true", resume="mine", walltime="00:00:01", view="true")
    output = trained(PROBLEM, f"--resume={path}", "--max-iterations=4")
    assert "records: runs/" in output and "APTS:" not in output
    assert {path: path.read_bytes() for path in (directory / "mine").rglob("*") if path.is_file()} == before


def test_which_options_are_the_calls():
    """A new option is one of the run, unless it is put here."""
    of_the_run = NAMES - set(OF_THE_CALL)
    assert set(OF_THE_CALL) <= NAMES
    assert {name for name in of_the_run if "." not in name} == {
        "problem", "problem_args", "network", "network_args", "loss",
        "data_dir", "train_samples", "epochs", "max_iterations", "max_seconds", "max_cpu_seconds",
        "batch_size", "micro_batch_size", "replay", "resample", "resample_by",
        "seed", "dtype", "autocast", "optimizer", "learning_rate", "layout", "subdomains", "replicas",
        "method", "noise", "stop_on", "patience", "keep_best", "target_loss", "gradient_tolerance",
        "relative_gradient_tolerance", "average",
        "checkpoint_every", "checkpoint_keep_last", "checkpoint_keep_every", "checkpoint_in_background",
        "drift_check_every",
    }  # fmt: skip
    assert TrainingOptions().device == "auto"


LINES = {"problem": "problem: {}", "local.solver": "local: {{solver: '{}'}}", "coarse.space": "coarse: {{space: '{}'}}"}


@pytest.mark.parametrize("option", LINES)
def test_programs_are_not_started_because_a_file_says_so(foreign, directory, command, option):
    """One that the command line names is, and its --config counts as that."""
    evil = f"evil_{option.replace('.', '_')}"  # each is imported once
    (directory / f"{evil}.py").write_text("open('started', 'w').close()\n")
    line = LINES[option].format(f"{evil}:f")
    path = foreign()
    change_metadata(path, lambda metadata: put(metadata, ["configuration"], yaml_of(metadata, line)))
    given = [] if option == "problem" else [PROBLEM]
    status, _, errors = command(*given, f"--resume={path}", "--run-dir=new")
    assert status == USAGE and errors.count("\n") == 1
    words = (
        f"{option}: the checkpoint names '{evil}:f', which is a program of yours; give --{option} {evil}:f to run it"
    )
    assert words in errors and not (directory / "started").exists()
    (directory / "mine.yaml").write_text(f"{line}\n")
    for named in (f"--{option}={evil}:f", "--config=mine.yaml"):
        status, _, errors = command(*given, f"--resume={path}", "--run-dir=new", named)
        assert status == USAGE and f"'{evil}' has no " in errors
    assert (directory / "started").exists()


def yaml_of(metadata, line):
    """The configuration with another line for one of its options or groups."""
    kept, inside = [], False
    for text in metadata["configuration"].splitlines():
        inside = text.split(":")[0] == line.split(":")[0] or (inside and text.startswith((" ", "-")))
        if not inside:
            kept.append(text)
    return "\n".join([*kept, line]) + "\n"


def test_data_are_not_read_because_a_file_says_so(foreign, refusal):
    path = foreign()
    set_options(path, data_dir="/etc")
    assert "data_dir: the checkpoint names '/etc', which is not read because a file says so; give" in refusal(path)
    assert "digits reads no files" in refusal(path, "--problem=digits", "--data-dir=/etc")


CONFIGURATIONS = {
    "/etc/passwd": "it names no options",
    "run.yaml": "it names no options",
    "config: run.yaml": "'config' is not accepted",
    "schwarz: run.yaml": "schwarz is a group of options",
    "no_such_option: 3": "'no_such_option' is not accepted",
    "epochs: 3\nepochs: 4": "'epochs' is given twice",
    "epochs: -3": "epochs: -3 is not allowed",
    "learning_rate: .inf": "learning_rate: inf is not allowed",
    "seed: x": "seed: 'x' is not allowed",
    "print_config: true": "'print_config' is not accepted",
    "help: true": "'help' is not accepted",
    "version: true": "'version' is not accepted",
    # Subdomains are those of the solver's metadata; what is refused is another type than the run had.
    "subdomains: 1000000000000": "dtype: 'float32' differs from the 'float64'",
    "replicas: 1000000000000": "replicas: 1000000000000 does not divide",
    "epochs: [" + "[" * 10**4: "it is no YAML",
}


@pytest.mark.parametrize("text", CONFIGURATIONS, ids=lambda text: text[:30])
def test_configuration_of_another_kind(foreign, refusal, directory, text):
    """Neither read from a path that it may be, nor taken for an option that ends the process."""
    (directory / "run.yaml").write_text("epochs: 3\n")
    path = foreign()
    change_metadata(path, lambda metadata: put(metadata, ["configuration"], text))
    assert CONFIGURATIONS[text] in refusal(path)


# The records

BOMBS = {
    "zeros": bytes(2**28),
    "one line": b'{"a": "' + b"a" * 2**27 + b'"}\n',
    "lines": b"{}\n" * 2**25,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_records_that_would_fill_the_memory(foreign, refusal, kind):
    compressed = np.frombuffer(zlib.compress(BOMBS[kind], 9), np.uint8)
    path = foreign()
    set_array(path, "training/history", compressed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "training/history is larger than records can be" in refusal(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # kilobytes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (zlib.compress(b"[1]\n"), "has a line 1 that is no record"),
        (zlib.compress(b"{}\n" + b"[" * 10**5 + b"\n"), "has a line 2 that is no record"),
        (zlib.compress(b'{}\n{"a": 1}'), "ends within a record"),
        (zlib.compress(b"\xff\n"), "has a line 1 that is no record"),
        (zlib.compress(b"{}\n")[:-3], "has no end, or more behind it"),
        (zlib.compress(b"{}\n") + b"more", "has no end, or more behind it"),
        (b"no zlib", "cannot be inflated"),
    ],
)
def test_records_that_are_none(foreign, refusal, content, words):
    path = foreign()
    set_array(path, "training/history", np.frombuffer(content, np.uint8))
    assert words in refusal(path)


def test_long_runs_of_equal_steps_are_records(saved):
    """What a run writes stays far below the bound: the numbers of a record are not those of the one before."""
    lines = [
        json.dumps({"iteration": n, "epoch": 1, "loss": 1.0, "accepted": False, "seconds": n / 7}) for n in range(9999)
    ]
    text = "\n".join(lines).encode()
    assert len(text) < 20 * len(zlib.compress(text, 1))


# Anything


VALUES = (
    *(None, True, False, 0, -1, 3, 2**31, 10**40, 0.5, -1e300, float("nan"), float("inf")),
    *("", "x", "a:b", "../x", "\ud800", "\n", "x" * 3000),
    *([], {}, [[]], [None], {"array": "x"}, {"array": "parameters/0.weight"}),
)


def places(tree, prefix=()):
    """All places in nested objects and lists."""
    found = [prefix] if prefix else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += places(value, (*prefix, key))
    return found


def mutate_text(chance, name):
    """One change of the index or the metadata, of a value or of a key."""

    def change(tree):
        place = chance.choice(places(tree))
        value = chance.choice((*VALUES, ...))
        if chance.random() < 0.2 and isinstance(place[-1], str):
            put(tree, (*place[:-1], chance.choice(("more", "", "array", "name", "\n"))), value)
        else:
            put(tree, place, value)

    return lambda path: change_text(path, name, change)


def mutate_structure(chance):
    """One change of an object in the file."""

    def change(path):
        with as_hdf5(path) as file:
            names = []
            file.visit(names.append)
            name = chance.choice(names)
            dataset = file[name] if isinstance(file[name], h5py.Dataset) else None
            shape, dtype = ((2,), np.dtype("f8")) if dataset is None else (dataset.shape, dataset.dtype)
            kind = chance.randrange(9)
            if kind == 0:
                file[f"{chance.choice(names).split('/')[0]}/more"] = np.zeros(2)
                return
            if dataset is not None and kind == 1 and shape and dataset.size:
                dataset[...] = np.frombuffer(chance.randbytes(dataset.nbytes), dtype).reshape(shape)
                return
            del file[name]
            if kind == 2:
                file[name] = h5py.SoftLink("/" + chance.choice(names))
            elif kind == 3:
                file[name] = h5py.ExternalLink("/etc/passwd", "/x")
            elif kind == 4:
                file.create_dataset(name, shape, dtype, external=[("/etc/passwd", 0, 10**9)])
            elif kind == 5:
                file.create_dataset(name, (*shape, 2), dtype, chunks=True, compression="gzip")
            elif kind == 6:
                file[name] = file[chance.choice([other for other in names if other in file])]
            elif kind == 7:
                layout = h5py.VirtualLayout((4,), dtype)
                layout[...] = h5py.VirtualSource("/etc/passwd", "x", (4,))
                file.create_virtual_dataset(name, layout)

    return change


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_changed_ends_in_one_line(saved, directory, command, capfd, seed):
    """Or in nothing, where the change is of no account. Each of the commands, and a run that goes on."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    statuses = set()
    for number in range(25):
        path = directory / "step-00000003.h5"
        shutil.copy(saved(chance.choice(("full", "adam"))), path)
        kinds = (
            mutate_text(chance, "checkpoint/index"),
            mutate_text(chance, "checkpoint/metadata"),
            mutate_structure(chance),
        )
        for change in chance.choices(kinds, (1, 3, 2), k=1 if number % 3 else 2):
            try:
                change(path)
            except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError, OSError):
                break  # the second change does not go together with the first, or leads to no file
        else:
            status, output, errors = command(
                PROBLEM, f"--resume={path}", f"--run-dir=run-{number}", "--max-iterations=4"
            )
            assert status in (0, USAGE) and "Traceback" not in errors, errors
            assert errors.count("\n") == (status != 0), errors
            statuses.add(status)
            for name, more in (("info", []), ("verify", []), ("to-torch", [str(directory / "out.pt")])):
                capfd.readouterr()
                with pytest.raises(SystemExit) as ended:
                    __main__.main([name, str(path), *more])
                output, errors = capfd.readouterr()
                assert ended.value.code in (0, 1, 2) and "Traceback" not in output + errors
                assert errors.count("\n") == (ended.value.code == 2), errors
    assert USAGE in statuses
