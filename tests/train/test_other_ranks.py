"""A run that goes on on other ranks, or in the other layout, is the same run: its subdomains are those it had."""

import json

import pytest
from run_files import history

from apts_mpi.checkpoint import Checkpoint, resolve

COMMON = (
    "--problem=networks:uneven_problem --dtype=float64 --device=cpu --batch-size=30 --local.solver=adam "
    "--trust-region.initial_radius=0.2"
).split()
PIPELINE = ["--layout=staged", "--micro-batches=2", "--stall-timeout=60"]
STAGED = [*COMMON, *PIPELINE]
REPLICATED = [*COMMON, "--schwarz.variant=inexact", "--schwarz.local_data=full"]
RESUMED = [COMMON[0], "--resume=begun", "--run-dir=resumed", "--max-iterations=6"]


def steps(path):
    """What the iterations found, as numbers."""
    names = ("loss", "trial_loss", "rho", "radius")
    return [record[name] for record in history(path) if "rho" in record for name in names]


def cuts(path):
    """Where the saved subdomains begin."""
    with Checkpoint(resolve(path / "checkpoints")) as checkpoint:
        return [record["owned_start"] for record in checkpoint.metadata["solver"]["subdomains"]]


@pytest.fixture
def goes_on(world, directory, trained_on):
    """A function: trains on ``first`` ranks, and from the third iteration on ``then`` ranks, with more arguments there.

    The iterates are to be those of the run on the first ranks alone. Gives what was printed when it was resumed.
    """

    def call(first, then, arguments, *more):
        trained_on(first, *arguments, "--run-dir=whole", "--max-iterations=6")
        trained_on(first, *arguments, "--run-dir=begun", "--max-iterations=3")
        # A program of the user's has to be named again.
        problem = [argument for argument in arguments if argument.startswith("--problem=")][-1]
        output = trained_on(then, *RESUMED, problem, *more)
        if world.rank > 0:
            return output
        assert "resumed after iteration 3" in output
        assert cuts(directory / "resumed") == cuts(directory / "begun")
        expected = steps(directory / "whole")
        assert len(expected) == 24
        assert steps(directory / "resumed") == pytest.approx(expected[-len(steps(directory / "resumed")) :], rel=1e-10)
        return output

    return call


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize(
    ("first", "then", "arguments"),
    [
        (3, 2, []),
        (3, 1, []),
        (2, 1, []),
        (2, 3, ["--subdomains=3"]),
        (1, 3, ["--subdomains=4"]),
        (3, 2, ["--balance=cost"]),
        (3, 1, ["--local.solver=kfac"]),
        (3, 2, ["--local.solver=kfac", "--global-step=lsr1"]),
        (3, 2, ["--local.solver=lsr1", "--local.iterations=2"]),
        (3, 2, ["--coarse=none", "--subdomains=5"]),
        (3, 2, ["--problem=networks:tied_problem", "--local.solver=sgd"]),
        (3, 2, ["--problem=networks:blocks_problem", "--local.solver=tr"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_staged_on_other_ranks(world, goes_on, first, then, arguments):
    output = goes_on(first, then, [*STAGED, *arguments])
    assert "note:" not in output


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("then", [1, 2])
def test_named_cuts_are_those_of_their_number_of_stages(world, goes_on, then):
    output = goes_on(3, then, [*STAGED, "--cuts=0.1.0,4.0.0", "--balance=cost"])
    note = f"note: cuts: 0.1.0,4.0.0 are those of 3 stages; {then} are balanced by cost"
    assert output.count("note:") == output.count(note) == (world.rank == 0)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize(("first", "then"), [((4, 2), (2, 1)), ((4, 2), (4, 1)), ((3, 1), (4, 2)), ((4, 2), (3, 1))])
def test_with_replicas(goes_on, first, then):
    """Each with a number of ranks and of replicas."""
    output = goes_on(first[0], then[0], [*STAGED, "--subdomains=5", f"--replicas={first[1]}"], f"--replicas={then[1]}")
    assert "note:" not in output


LAYOUTS = [
    (3, 2, [*STAGED], ["--layout=replicated"]),
    (3, 1, [*STAGED, "--cuts=0.1.0,4.0.0", "--local.solver=kfac"], ["--layout=replicated"]),
    (3, 2, [*STAGED, "--balance=cost", "--local.solver=lsr1"], ["--layout=replicated"]),
    (2, 3, [*REPLICATED, "--subdomains=4"], PIPELINE),
    (3, 2, [*REPLICATED, "--local.solver=kfac"], PIPELINE),
    (1, 3, [*REPLICATED, "--schwarz.cuts=[0,44,207,390]"], PIPELINE),
]


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize(("first", "then", "begin", "more"), LAYOUTS, ids=range(len(LAYOUTS)))
def test_in_the_other_layout(goes_on, first, then, begin, more):
    assert "note:" not in goes_on(first, then, begin, *more)


@pytest.mark.mpi(min_size=3)
def test_a_chain_of_layouts(world, directory, trained_on):
    """The local objective, left to ``auto``, is that of the run, whatever the layouts between."""
    line = [*STAGED, "--local.solver=kfac"]
    trained_on(3, *line, "--run-dir=run", "--max-iterations=2")
    outputs = [
        trained_on(2, COMMON[0], "--resume=run", "--max-iterations=3", "--layout=replicated", "--run-dir=run"),
        trained_on(1, COMMON[0], "--resume=run", "--max-iterations=4", "--run-dir=run"),
        trained_on(2, COMMON[0], "--resume=run", "--max-iterations=6", "--run-dir=run", *PIPELINE),
    ]
    trained_on(3, *line, "--run-dir=whole", "--max-iterations=6")
    if world.rank == 0:
        assert "note:" not in "".join(outputs)
        assert steps(directory / "run") == pytest.approx(steps(directory / "whole"), rel=1e-10)


@pytest.mark.mpi(min_size=2)
@pytest.mark.usefixtures("few_ranks")
def test_what_layout_staged_does_otherwise_is_said(world, directory, trained_on):
    trained_on(2, *COMMON, "--run-dir=begun", "--max-iterations=3", "--local.iterations=2")
    output = trained_on(2, *RESUMED, *PIPELINE)
    note = "note: schwarz.local_data: full with layout staged, where it was shard: what follows is another run"
    assert output.count("note:") == output.count(note) == (world.rank == 0)


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize(
    "arguments",
    [
        ["--schwarz.overlap=1"],
        ["--schwarz.partition=index", "--schwarz.overlap=7"],
        ["--local.solver=gauss-newton", "--schwarz.overlap=3", "--subdomains=2"],
        ["--schwarz.decomposition=data", "--local.iterations=2"],
        ["--schwarz.cuts=[0,207,400]", "--schwarz.overlap=2"],
    ],
    ids=" ".join,
)
def test_replicated_with_overlap_and_other_partitions(goes_on, arguments):
    assert "note:" not in goes_on(3, 2, [*COMMON, *arguments])


@pytest.mark.mpi(min_size=3)
@pytest.mark.all_sizes
def test_more_stages_than_subdomains(world, directory, trained_on):
    """One becomes two, which is said; the run goes on as what it is then, on any number of ranks."""
    trained_on(2, *STAGED, "--run-dir=begun", "--max-iterations=3")
    output = trained_on(3, *RESUMED)
    trained_on(3, COMMON[0], "--resume=resumed", "--run-dir=whole", "--max-iterations=9")
    again = trained_on(2, COMMON[0], "--resume=resumed", "--run-dir=again", "--max-iterations=9")
    if world.rank > 0:
        return
    begins = "stage 2 (modules 4.1.0 to 5) begins within subdomain 1"
    note = f"note: subdomains: 2 become 3, as {begins}; iterates are those of 3"
    assert output.count("note:") == output.count(note) == 1
    assert "note:" not in again
    assert set(cuts(directory / "begun")) < set(cuts(directory / "resumed"))
    assert steps(directory / "again") == pytest.approx(steps(directory / "whole"), rel=1e-10)


@pytest.mark.mpi(min_size=4)
def test_three_ranks_go_on_on_four(world, directory, trained_on):
    trained_on(3, *STAGED, "--run-dir=begun", "--max-iterations=3")
    output = trained_on(4, *RESUMED)
    if world.rank == 0:
        assert output.count("note:") == output.count("note: subdomains: 3 become 4, as stage ") == 1
        assert len(cuts(directory / "resumed")) == 4


@pytest.mark.mpi(min_size=3)
@pytest.mark.all_sizes
def test_the_same_command_line_again(world, directory, trained_on):
    """That of a batch job, with a number of subdomains and of the same or fewer ranks."""
    line = [*STAGED, "--subdomains=3", "--run-dir=run", "--resume"]
    trained_on(3, *line, "--max-iterations=3")
    output = trained_on(2, *line, "--max-iterations=6")
    trained_on(3, *STAGED, "--subdomains=3", "--run-dir=whole", "--max-iterations=6")
    if world.rank == 0:
        assert "note:" not in output
        assert steps(directory / "run") == pytest.approx(steps(directory / "whole"), rel=1e-10)


@pytest.mark.mpi(min_size=3)
def test_other_subdomains_are_those_asked_for(world, directory, trained_on):
    trained_on(3, *STAGED, "--balance=cost", "--run-dir=begun", "--max-iterations=3")
    other = trained_on(2, *RESUMED, "--subdomains=4")
    trained_on(2, *RESUMED, "--overwrite", "--schwarz.cuts=[0,144]", "--layout=replicated", "--run-dir=third")
    if world.rank == 0:
        note = "note: subdomains: 4 as asked for, where 3 were saved: what follows is another run"
        assert other.count("note:") == other.count(note) == 1
        assert cuts(directory / "third") == [0, 144]


@pytest.mark.mpi(min_size=3)
def test_a_new_run_says_what_its_stages_cut(world, directory, trained_on):
    output = trained_on(3, *STAGED, "--subdomains=3", "--cuts=0.1.0,4.0.0", "--run-dir=run", "--max-iterations=1")
    note = (
        "note: subdomains: 3 become 4, as stage 1 (modules 0.1.0 to 3.1) begins within subdomain 0; iterates are those"
    )
    assert output.count("note:") == output.count(note) == (world.rank == 0)
    if world.rank == 0:
        assert json.loads((directory / "run" / "summary.json").read_text())["subdomains"] == 4
