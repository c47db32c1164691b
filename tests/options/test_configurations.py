"""Configurations in YAML and on the command line: what is none is told in one line, with the beginning of the value."""

import dataclasses
import math
from typing import get_args, get_type_hints

import pytest

from apts_mpi.compare.options import ComparisonOptions
from apts_mpi.errors import InvalidInput, shown
from apts_mpi.options import APTSOptions
from apts_mpi.train.configuration import GROUPS, NAMES
from apts_mpi.train.options import TrainingOptions, as_seconds
from apts_mpi.train.parser import make_parser, parse


def refusal(*arguments):
    """The message, which is one line that can be read."""
    with pytest.raises(InvalidInput) as caught:
        parse(arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 800 and message.isprintable()
    return message


@pytest.fixture
def refusal_of(tmp_path, monkeypatch):
    """A function of the content of a configuration file that gives the message."""
    monkeypatch.chdir(tmp_path)

    def refused(content):
        (tmp_path / "run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return refusal("--config=run.yaml")

    return refused


FLOATS = [
    (kind, field.name)
    for kind in (TrainingOptions, APTSOptions, ComparisonOptions, *map(get_type_hints(TrainingOptions).get, GROUPS))
    for field in dataclasses.fields(kind)
    if float in (get_type_hints(kind)[field.name], *get_args(get_type_hints(kind)[field.name]))
]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("kind", "name"), FLOATS, ids=lambda part: getattr(part, "__name__", part))
def test_every_number_is_finite(kind, name, value):
    """Also of options that nobody has written yet."""
    needed = {"problems": ("digits",)} if kind is ComparisonOptions else {}
    with pytest.raises(InvalidInput, match=f"{name}: {value} is not allowed; give a finite number"):
        kind(**needed, **{name: value})


def test_there_are_numbers():
    assert {"learning_rate", "max_seconds", "stall_timeout", "eta1", "samples", "decay"} <= {name for _, name in FLOATS}


@pytest.mark.parametrize("value", ["1e400", "-1e400", ".inf", "nan", ".nan"])
def test_numbers_of_the_command_line_are_finite(value):
    assert "learning_rate: " in (message := refusal(f"--learning-rate={value}")) or '"learning_rate"' in message
    assert "trust_region.eta1: " in (message := refusal(f"--trust-region.eta1={value}")) or "eta1" in message


@pytest.mark.parametrize(
    "time", ["9" * 400 + "s", "9" * 5000 + ":00:00", "1" * 400 + "-00:00:00", "1." + "0" * 400 + "h"]
)
def test_times_of_many_digits_are_none(time):
    assert as_seconds(time) is None
    assert "walltime: " in refusal(f"--walltime={time}")


def test_a_seed_that_random_streams_cannot_take_is_refused():
    assert "seed: 1000000000000000000 is not allowed; give 0 or more" in refusal(f"--seed={10**18}")


GROUP_VALUES = ["5", "true", "x", "[1, 2]", "null", "~", "", "'/etc/passwd'", "- a"]


@pytest.mark.parametrize("group", sorted(GROUPS))
@pytest.mark.parametrize("value", GROUP_VALUES)
def test_group_of_another_kind(refusal_of, group, value):
    message = refusal_of(f"epochs: 3\n{group}: {value}\n" if value != "- a" else f"{group}:\n- a\n")
    assert message.startswith(f"config: 'run.yaml': {group} is a group of options; give lines such as '{group}.")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs: 3\nseed: 1\nepochs: 4\n", "'epochs' is given twice"),
        ("schwarz:\n  overlap: 1\n  type: basic\n  overlap: 2\n", "'schwarz.overlap' is given twice"),
        ("schwarz:\n  overlap: 1\nseed: 2\nschwarz:\n  overlap: 2\n", "'schwarz.overlap' is given twice"),
        ("schwarz.overlap: 1\nschwarz:\n  overlap: 2\n", "'schwarz.overlap' is given twice"),
        ('"epochs": 3\nepochs: 3\n', "'epochs' is given twice"),
        ("epochs: {a: 1}\n", "epochs is neither a value nor a list of values"),
        ("epochs: [[1]]\n", "epochs is neither a value nor a list of values"),
        ("coarse:\n  columns: [correction, [last_step]]\n", "coarse.columns is neither a value nor a list"),
        ("epochs: !!python/object:os.system 1\n", "epochs is neither a value nor a list of values"),
        ("epochs: !!binary aGVsbG8=\n", "epochs is neither a value nor a list of values"),
        ("[1]: 3\n", "'a list or mapping' is not accepted"),
        ("config: other.yaml\n", "'config' is not accepted"),
        ("help: true\n", "'help' is not accepted"),
        ("<<: {epochs: 3}\n", "'<<' is not accepted"),
        ("schwarz:\n  overlaps: 3\n", "'schwarz.overlaps' is not accepted"),
        ("batch-size: 3\n", "'batch-size' is not accepted"),
        ("a\\\x1b: 3\n", "it is no YAML"),
        (f"? {'k' * 10**6}\n: 3\n", "is not accepted"),
        ("", "it names no options"),
        ("# nothing\n", "it names no options"),
        ("---\n", "it names no options"),
        ("{}\n", "it names no options"),
        ("- epochs: 3\n", "it names no options"),
        ("epochs\n", "it names no options"),
        ("null\n", "it names no options"),
        ("epochs: 3\n---\nepochs: 4\n", "it is no YAML"),
        ("epochs: 3\n  seed: 4\n", "it is no YAML"),
        ("a: &a [*a]\nb: *c\n", "it is no YAML"),
        ("epochs: &a [*a]\n", "epochs is neither a value nor a list of values"),
        ("epochs: " + "[" * 10**4, "it is no YAML"),
        (b"\x89HDF\r\n\x1a\n\x00\x00", "it is no text in UTF-8"),
        ("epochs: 3 # \xe9\n".encode("latin-1"), "it is no text in UTF-8"),
        (b"epochs: \x00\n", "it is no YAML"),
        ("epochs: 0x" + "f" * 10**5 + "\n", "epochs"),
        ("epochs: " + "9" * 10**5 + "\n", "epochs"),
        ("seed: 2020-13-45\n", "seed"),
    ],
    ids=lambda part: repr(part)[:40],
)  # fmt: skip
def test_file_that_is_no_configuration(refusal_of, text, words):
    assert words in refusal_of(text)


def test_aliases_do_not_multiply(refusal_of):
    """Of nine lists in each other, with nine entries each, nothing is written out."""
    lists = ["&a0 [x, x, x, x, x, x, x, x, x]"]
    lists += [f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    assert "'a list or mapping' is not accepted" in refusal_of("".join(f"? {text}\n: 1\n" for text in lists))
    assert "epochs is neither a value" in refusal_of(f"seed: 1\nepochs: [{', '.join(lists)}]\n")


@pytest.mark.parametrize("kind", ["directory", "absent", "below a file", "no name"])
def test_what_is_no_file(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    path = {"directory": str(tmp_path), "absent": "absent.yaml", "below a file": "file/x.yaml", "no name": ""}[kind]
    assert "cannot be read (" in refusal(f"--config={path}")
    assert "cannot be read (" in refusal("--config", path)


@pytest.mark.parametrize(
    "option",
    ["problem", "learning-rate", "seed", "local.solver", "coarse.columns", "dtype", "walltime", "checkpoint-every",
     "schwarz.overlap", "data-dir", "run-dir", "nonsense", "config", "schwarz"],
)  # fmt: skip
@pytest.mark.parametrize("value", ["x" * 5_000_000, "x " * 100_000, "\x1b[2J\n" * 1000], ids=["long", "words", "signs"])
def test_long_values_are_shown_by_their_beginnings(option, value):
    assert len(refusal(f"--{option}={value}")) < 800


def test_values_as_messages_show_them():
    assert shown("x") == "'x'" and shown(0.5) == "0.5" and shown((0.0, 1e4)) == "(0.0, 10000.0)"
    for value in ("x" * 10**6, 10**50_000, [list(range(1000))] * 1000, {"a" * 1000: "b" * 1000}, b"\n" * 1000):
        assert len(shown(value)) <= 100 and "\n" not in shown(value)


def test_a_group_as_a_whole_on_the_command_line():
    options, _ = parse(["--schwarz.overlap=1", "--schwarz={overlap: 3, type: basic}"])
    assert (options.schwarz.overlap, options.schwarz.type) == (3, "basic")
    assert "schwarz is a group of options" in refusal("--schwarz", "5")
    assert "schwarz is a group of options" in refusal("--schwarz=run.yaml")


def test_values_of_all_kinds_in_a_file(tmp_path):
    """As the command line has them; null by all its names, and quoted or not."""
    (tmp_path / "run.yaml").write_text(
        "# a comment\nepochs: ~\nmax_iterations: null\nmax_seconds:\nwalltime: 01:30:00\noverwrite: yes\n"
        "learning_rate: 1e-2\ncheckpoint_every: 7\nschwarz: {overlap: 2}\ntrust_region:\n  norm: '2'\n  window: 0x10\n"
        "coarse:\n  columns:\n  - correction\n  - gradient\ndata_dir: '5'\nproblem: \"digits\"\n"
    )
    options, text = parse([f"--config={tmp_path / 'run.yaml'}", "--coarse.damping=0.5"])
    assert (options.epochs, options.max_iterations, options.max_seconds) == (None, None, None)
    assert (options.walltime, options.overwrite, options.learning_rate) == ("01:30:00", True, 0.01)
    assert (options.checkpoint_every, options.schwarz.overlap, options.trust_region.norm) == (7, 2, "2")
    assert (options.trust_region.window, tuple(options.coarse.columns)) == (16, ("correction", "gradient"))
    assert (options.data_dir, options.problem, options.coarse.damping) == ("5", "digits", 0.5)
    (tmp_path / "again.yaml").write_text(text)
    again, same = parse([f"--config={tmp_path / 'again.yaml'}"])
    assert same == text and dataclasses.replace(options, overwrite=False) == again


def test_the_names_are_those_of_the_parser():
    known = {action.dest for action in make_parser()._actions}
    assert known - {"help", "help_all", "version", "config", "print_config"} == NAMES | GROUPS


@pytest.mark.parametrize("argument", ["--probl=digits", "--conf=x.yaml", "--schwarz.over=1"])
def test_beginnings_of_names_are_refused(argument):
    assert "unrecognized arguments" in refusal(argument)
