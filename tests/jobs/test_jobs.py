"""The scripts in jobs/: their syntax, and the check that every test ran at some number of ranks."""

import runpy
import subprocess
import sys

import pytest
from processes import TESTS

pytest_plugins = ["pytester"]

ROOT = TESTS.parent
SCRIPTS = [*sorted((ROOT / "jobs").glob("*.sh")), *TESTS.rglob("*.sh"), ROOT / ".ci" / "run"]


@pytest.mark.processes
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_syntax(script):
    subprocess.run(["bash", "-n", script], check=True)


class Results:
    """A directory of results as local_test.sh makes it, from real runs of pytest."""

    def __init__(self, pytester, monkeypatch, capsys):
        self.pytester, self.monkeypatch, self.capsys = pytester, monkeypatch, capsys
        self.path = pytester.path / "results"

    def add(self, run, source, status=None, rank=0, options=()):
        """Run pytest on `source` as one rank of `run`; `status` is that of the whole run, by default pytest's."""
        directory = self.path / run
        directory.mkdir(parents=True, exist_ok=True)
        file = self.pytester.makepyfile(test_it="import pytest\n" + source)
        report = f"--junit-xml={directory}/rank_{rank}.xml"
        done = self.pytester.runpytest_inprocess("--with-mpi", report, *options, file)
        (directory / "status").write_text(str(int(done.ret) if status is None else status))

    def check(self):
        """Exit status and lines of check_every_test_ran.py."""
        self.monkeypatch.setattr(sys, "argv", ["check_every_test_ran.py", str(self.path)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "jobs" / "check_every_test_ran.py"), run_name="__main__")
        output, errors = self.capsys.readouterr()
        assert errors == ""
        return end.value.code, output.splitlines()


@pytest.fixture
def results(pytester, monkeypatch, capsys):
    pytester.makeini("[pytest]\nmarkers = mpi")
    return Results(pytester, monkeypatch, capsys)


NEEDS_TWO = "@pytest.mark.mpi(min_size=2)\ndef test_two(): pass\n"
PASSES = "def test_two(): pass\n"
FAILS = "def test_two(): assert False\n"


def test_counts_each_run(results):
    results.add("plain", "def test_plain(): pass\n@pytest.mark.xfail\ndef test_expected(): assert False\n")
    results.add("ranks_1", NEEDS_TWO)
    results.add("ranks_2", PASSES)
    results.add("ranks_3", PASSES)
    assert results.check() == (0, ["4 passed, 0 failed"])


def test_too_few_ranks_in_every_run(results):
    results.add("plain", "def test_plain(): pass\n")
    results.add("ranks_1", NEEDS_TWO)
    status, lines = results.check()
    assert status == 1
    assert lines[0].startswith("ran at no number of ranks: test_it::test_two (Test requires 2 MPI processes")
    assert lines[1:] == ["1 passed, 0 failed"]


def test_skipped_for_another_reason(results):
    results.add("ranks_1", NEEDS_TWO + PASSES.replace("two", "one"))
    results.add("ranks_2", "def test_two(): pytest.skip('no GPU')\n" + PASSES.replace("two", "one"))
    assert results.check() == (0, ["not run here: test_it::test_two (no GPU)", "2 passed, 0 failed"])


def test_failure_on_one_rank(results):
    results.add("ranks_2", PASSES)
    results.add("ranks_2", FAILS, rank=1)
    assert results.check() == (1, ["failed in ranks_2: test_it::test_two", "0 passed, 1 failed"])


def test_failure_in_teardown(results):
    fixture = "@pytest.fixture\ndef broken():\n    yield\n    assert False\n"
    results.add("ranks_1", fixture + "def test_both(broken): assert False\ndef test_teardown(broken): pass\n")
    lines = ["failed in ranks_1: test_it::test_both", "failed in ranks_1: test_it::test_teardown"]
    assert results.check() == (1, [*lines, "0 passed, 2 failed"])


def test_failure_at_import(results):
    results.add("ranks_1", "import nowhere\n")
    assert results.check() == (1, ["failed in ranks_1: test_it", "0 passed, 1 failed"])


@pytest.mark.parametrize("status, end", [(124, "at the time limit"), (6, "with status 6")])
def test_run_that_did_not_end_by_itself(results, status, end):
    results.add("ranks_1", PASSES)
    results.add("ranks_2", PASSES, status=status)
    (results.path / "ranks_2" / "rank_1.xml").write_text("<testsuites><testsui")
    assert results.check() == (1, [f"failed in ranks_2: the run ended {end}", "2 passed, 1 failed"])


def test_no_test_selected(results):
    results.add("plain", PASSES, options=("-k", "nothing"))
    assert results.check() == (1, ["no test ran", "0 passed, 0 failed"])
    results.add("ranks_1", PASSES)
    assert results.check() == (0, ["1 passed, 0 failed"])


MARKED = """
import pytest

@pytest.mark.mpi
@pytest.mark.all_sizes
def test_whole(): pass

@pytest.mark.mpi
@pytest.mark.all_sizes(a=1, b="x")
@pytest.mark.parametrize("a", [1, 2])
@pytest.mark.parametrize("b", ["x", "y"])
def test_rows(a, b): pass

@pytest.mark.mpi
def test_other(): pass
"""


@pytest.fixture
def chosen(pytester):
    """A function that gives the tests of a file which run where not all do, or where all do."""
    pytester.makeini("[pytest]\nmarkers =\n    mpi\n    all_sizes")
    selection = runpy.run_path(str(ROOT / "jobs" / "pytest_on_rank.py"))["Selection"]

    def choose(source, every_test):
        pytester.makepyfile(test_unread="import nowhere", test_marked=source)
        done = pytester.inline_run("--with-mpi", plugins=[selection(every_test)])
        reports = done.getreports("pytest_runtest_logreport")
        return done.ret, [report.nodeid.partition("::")[2] for report in reports if report.when == "call"]

    return choose


def test_other_numbers_of_ranks_are_for_the_rows_that_are_marked(chosen):
    assert chosen(MARKED, every_test=False) == (0, ["test_whole", "test_rows[x-1]"])
    assert len(chosen(MARKED, every_test=True)[1]) == 6


def test_a_marker_with_unknown_parameters_is_refused(chosen):
    assert chosen(MARKED.replace("a=1", "c=1"), every_test=False) == (pytest.ExitCode.USAGE_ERROR, [])
