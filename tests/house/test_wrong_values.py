"""Every option of every command, given what it cannot be: one line with the option and the remedy, and no traceback."""

import argparse
import contextlib
import functools
import importlib
import io
import random
import re

import jsonargparse
import pytest

from apts_mpi.tools.parser import Parser
from apts_mpi.train import command as train_command
from apts_mpi.train import parser as train_parser

# What is no number, no choice and no name of anything; then numbers, which some options take.
WRONG = ("", "wrong", "1e400", "nan", "[", "{", "größe→", "\udcff", "x" * 5000, "9" * 5000, "[1,", "!!x", "1 2", "--")
DOUBTFUL = ("-1", "0", "-1.5", "2.5", "true", "null")

# What nobody should have to read.
INTERNALS = re.compile(
    "argparse|pydantic|Parser key|invalid literal|Traceback|Error\\b|NoneType|<class|<function|object at"
    "|could not convert|Literal\\[|Expected|unicode string"
)

# By command: its package, what it has to be given, what does its work, and how many wrong values an option gets here.
COMMANDS = {
    "train": ("train", [], "train.run.run", 1),
    "bench": ("bench", [], "bench.__main__.measurements", 4),
    "doctor": ("doctor", [], "doctor.examination.carry_out", 4),
    "plot": ("plot", ["run"], "plot.__main__.group", 4),
    "checkpoint": ("checkpoint", [], "checkpoint.__main__.Console", 4),
    "scaling": ("scaling", [], "scaling.__main__.Console", 4),
    "compare": ("compare", ["digits"], "compare.__main__.compare", 2),
    "compare continual": ("compare.continual", [], "compare.continual.__main__.rows_of", 4),
    "compare papers": ("compare.papers", [], "compare.papers.__main__.compare", 2),
    "compare full_batch": (
        "compare.full_batch",
        ["--problem=digits", "--optimizer=spring", "--run_dir=run"],
        "compare.full_batch.__main__.run",
        2,
    ),
}

# What a part of a command has to be given.
GIVEN = {
    **{f"checkpoint {name}": ["file"] for name in ("info", "verify")},
    **{f"checkpoint {name}": ["in", "out"] for name in ("diff", "to-torch", "from-torch")},
    **{f"checkpoint {name}": ["in", "out"] for name in ("to-safetensors", "from-safetensors")},
    "scaling run": ["weak", "file", "--ranks=2"],
    **{f"scaling {name}": ["file"] for name in ("report", "predict", "simulate", "network")},
}

# Texts that may be anything: of files and directories, and names that are looked up by what does the work.
FREE = {"--directory", "--run-dir", "--run_dir", "--out", "--hdf5", "--json", "--plot", "--network", "--measured-on"}
FREE |= {"--problem", "--data_dir", "--loss", "--resume", "--stop_on", "--pipeline.cuts"}

SHOWING = {"--help", "--help_all", "--version", "--print_config"}


class Accepted(BaseException):
    """A command has taken its options, and would begin its work."""


class Found(BaseException):
    """The parser of a command."""


@pytest.fixture
def main_of(monkeypatch):
    """A function of a command that gives its main function, which does no work."""

    def accept(*_, **__):
        raise Accepted

    def tell(world, message):
        raise AssertionError(message)  # else all ranks are ended

    monkeypatch.setattr(train_command, "end_job", tell)
    monkeypatch.setattr(train_command, "train", without_work)
    monkeypatch.setattr(train_parser, "make_parser", functools.cache(train_parser.make_parser))

    def prepare(command):
        package, _, work, _ = COMMANDS[command]
        module, _, name = work.rpartition(".")
        monkeypatch.setattr(importlib.import_module(f"apts_mpi.{module}"), name, accept)
        return importlib.import_module(f"apts_mpi.{package}.__main__").main

    return prepare


def without_work(arguments, run, world, train=train_command.train):
    """`train` of the command, with the ranks told of its error as they are, and nothing after the options."""
    try:
        return train(arguments, run, world)
    except Accepted:
        raise SystemExit(0) from None


def outcome(main, arguments):
    """Exit status of a command, 0 where its work would begin, and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            main(arguments)
        except Accepted:
            return 0, ""
        except SystemExit as ended:
            return ended.code or 0, said.getvalue()
    return 0, said.getvalue()


def parser_of(command, main):
    """The parser that a command makes for itself."""
    if command == "train":
        return train_parser.make_parser()

    def find(self, *_, **__):
        raise Found(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", find)
        patch.setattr(jsonargparse.ArgumentParser, "parse_args", find)
        with pytest.raises(Found) as found:
            main([])
    return found.value.args[0]


def options_of(parser, command):
    """The arguments that go before an option of a command or of a part of it, and the option."""
    for part in [parser, *(parser._parts if isinstance(parser, Parser) else [])]:
        name = part.prog.removeprefix("apts_mpi.").replace("compare.", "compare ")
        before = [*name.removeprefix(command).split(), *GIVEN.get(name, [])]
        for action in part._actions:
            if action.option_strings and action.option_strings[-1] not in SHOWING:
                yield before, action.option_strings[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_values_are_refused_in_words(main_of, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    main, (_, given, _, number) = main_of(command), COMMANDS[command]
    for before, option in options_of(parser_of(command, main), command):
        draw = random.Random(f"{command} {before} {option}")
        for value in [*draw.sample(WRONG, number), *draw.sample(DOUBTFUL, number // 2)]:
            status, said = outcome(main, [*before, *given, f"{option}={value}"])
            what = f"{command} {before} {option}={value[:20]!r}: {status}, {said}"
            if status == 0 and said == "" and (option in FREE or value in DOUBTFUL):
                continue
            assert status == 2 and said.count("\n") == 1 and len(said) < 1000, what
            assert not INTERNALS.search(said) and "; " in said, what
            name = option.strip("-").rpartition(".")[2].replace("_", "-")
            assert option in FREE or name in said.replace("_", "-"), what


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "checkpoint"])
def test_an_option_that_is_misspelled_is_answered_by_its_name(main_of, command):
    main = main_of(command)
    parser = parser_of(command, main)
    before, option = max(options_of(parser, command), key=lambda pair: len(pair[1]))
    status, said = outcome(main, [*before, *COMMANDS[command][1], option[:-2] + option[-1] + option[-2] + "=1"])
    assert status == 2 and f"did you mean {option.replace('_', '-')}?" in said, said
