"""The claims of the papers: what is said of runs whose ends are known, and what is refused."""

import json

import pytest

from apts_mpi.compare.__main__ import main
from apts_mpi.compare.papers.__main__ import page_of, parse
from apts_mpi.compare.papers.claims import claims
from apts_mpi.compare.papers.runs import PapersOptions, variants
from apts_mpi.errors import InvalidInput

# Of the runs: test accuracy, rejected steps, CPU seconds. With 3 subdomains and with 2, and the best of the grid.
ENDS = {
    ("apts", 2): (0.70, 30, 10.0),
    ("apts", 3): (0.72, 20, 12.0),
    ("napts", 2): (0.80, 10, 6.0),
    ("napts", 3): (0.75, 10, 11.0),
    ("adam", 0.01): (0.78, 0, 1.0),
    ("sgd", 0.1): (0.71, 0, 1.0),
}


@pytest.fixture
def rows(tmp_path):
    """Of finished runs of `ENDS`; Adam and SGD at other step sizes are worse."""
    options = PapersOptions(problems=("digits",), methods="apts,napts", subdomains="2,3", seeds=1, out=str(tmp_path))
    rows = variants("digits", options)
    for row in rows:
        accuracy, rejected, seconds = ENDS.get((row.name, row.choice), (0.1, 0, 1.0))
        summary = {"ranks": 1, "test_accuracy": accuracy, "rejected_steps": rejected, "cpu_seconds": seconds}
        (run,) = row.runs
        run.path.mkdir(parents=True)
        (run.path / "config.yaml").write_text(run.config)
        (run.path / "history.jsonl").write_text("")
        (run.path / "summary.json").write_text(json.dumps(summary | {"seconds": seconds}))
    return rows


def test_what_is_claimed_is_held_against_the_numbers(rows):
    said = dict(line.split(": ", 1) for line in claims(rows))
    answers = {claim: answer.split()[0] for claim, answer in said.items()}
    assert answers == {
        "apts as good as tuned adam": "no",
        "napts as good as tuned adam": "yes",
        "apts as good as tuned sgd": "yes",
        "napts as good as tuned sgd": "yes",
        "apts better with more subdomains": "yes",
        "apts with less work a subdomain": "yes",
        "napts better with more subdomains": "no",
        "napts with less work a subdomain": "no",
        "napts with a third of the rejections of apts, 2 subdomains": "yes",
        "napts with a third of the rejections of apts, 3 subdomains": "no",
        "napts with 30 % less time than apts, 2 subdomains": "yes",
        "napts with 30 % less time than apts, 3 subdomains": "no",
    }
    assert said["apts as good as tuned adam"] == "no (test_accuracy 0.72 with 3 subdomains, 0.78 at 0.01)"


def test_a_run_that_failed_says_nothing(rows):
    (lost,) = rows[0].runs
    (lost.path / "summary.json").unlink()
    said = claims(rows)
    assert not any("apts with a third" in line and "2 subdomains:" in line for line in said)
    assert not any(line.startswith("apts better with more") for line in said)
    assert "| apts | 2 subdomains | nan |" in page_of("digits", rows, [])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--methods adam", "methods: 'adam'"),
        ("--subdomains 2,x", "subdomains: 'x'"),
        ("--seeds 0", "seeds: 0"),
        ("--epoch 3", "--help lists"),
    ],
)
def test_what_cannot_be_used_is_refused(line, message, capsys):
    with pytest.raises(InvalidInput):
        parse(line.split())
    with pytest.raises(SystemExit) as ended:
        main(["papers", *line.split()])
    assert ended.value.code == 2 and message in capsys.readouterr().err
