"""A local solver, a coarse space and a problem in a file each, as docs/changing.md has them, in a user's directory."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
from mpi4py import MPI
from networks import classified, classifier, cross_entropy
from processes import TESTS

from apts_mpi import APTS, APTSOptions, CoarseOptions, InvalidInput, LocalOptions, StagedAPTS
from apts_mpi.errors import SharedInvalidInput
from apts_mpi.schwarz import CoarseSpace, Column

PAGE = TESTS.parent / "docs" / "changing.md"


@pytest.fixture
def pages(world, directory):
    """The files of the page in the current directory."""
    page = PAGE.read_text(encoding="utf-8")
    if world.rank == 0:
        for name, text in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
            (directory / name).write_text(text)
    world.Barrier()
    return directory


def losses(directory, run):
    lines = (directory / run / "history.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@pytest.mark.parametrize("layout", ["replicated", "staged"])
def test_they_work_in_both_layouts_and_with_checkpoints(world, pages, trained, layout):
    """The files are all that it takes; an interrupted run goes on to the bit, with what both of them keep."""
    chosen = (
        f"--problem=spirals:spirals --layout={layout} --batch-size=250 --local.solver=sign_descent:SignDescent "
        "--coarse.space=mean_step:MeanStep --subdomains=3 --dtype=float64 --device=cpu --epochs=9"
    ).split()
    trained(*chosen, "--max-iterations=8", "--run-dir=whole")
    trained(*chosen, "--max-iterations=5", "--run-dir=parts")
    programs = [option for option in chosen if ":" in option]
    resumed = trained(*programs, "--resume", "--run-dir=parts", "--max-iterations=8")
    other = trained(programs[0], "--resume=parts", "--run-dir=other", "--coarse.space=subdomains", "--local.solver=sgd")
    if world.rank > 0:
        return
    assert "note:" not in resumed
    whole = losses(pages, "whole")
    assert len(whole) == 8 and whole[-1] < whole[0]
    assert losses(pages, "parts") == whole
    assert "state of coarse space mean_step:MeanStep is of no use to another" in other
    assert "state of local solver sign_descent:SignDescent is of no use to another" in other


WRONG = {
    "no_module:Solver": "importing 'no_module' failed",
    "wrong:Missing": "'wrong' has no class 'Missing'",
    "wrong:function": "it is not a class derived from apts_mpi.local.LocalSolver",
    "wrong:Space": "it is not a class derived from apts_mpi.local.LocalSolver",
    "sgd:": "choose one of auto, kfac",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_local_solver_is_refused(directory, name):
    (directory / "wrong.py").write_text("class Space: pass\ndef function(): pass\n")
    with pytest.raises(InvalidInput, match=re.escape(WRONG[name])):
        APTS(classifier(), cross_entropy, comm=MPI.COMM_SELF, options=APTSOptions(local=LocalOptions(solver=name)))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("made", ["nothing", "outside", "an error"])
@pytest.mark.parametrize("kind", [APTS, StagedAPTS])
def test_a_space_that_fails_on_one_rank_fails_on_all(world, monkeypatch, made, kind):
    class Space(CoarseSpace):
        def columns(self, state):
            columns = list(state.corrections)
            if world.rank == world.size - 1:
                if made == "an error":
                    raise InvalidInput("no luck")
                columns = [] if made == "nothing" else [Column(0, 10**6, state.gradient)]
            return columns

    monkeypatch.setitem(sys.modules, "spaces_of_the_test", SimpleNamespace(Space=Space))
    options = APTSOptions(
        layout="staged" if kind is StagedAPTS else "replicated",
        coarse=CoarseOptions(space="spaces_of_the_test:Space"),
    )
    solver = kind(classifier(), cross_entropy, comm=world, options=options)
    words = {"nothing": "made no columns", "outside": "column 0 of .* give 0 <= start < stop", "an error": "no luck"}
    with pytest.raises(SharedInvalidInput, match=words[made]):
        solver.step(classified(60))
