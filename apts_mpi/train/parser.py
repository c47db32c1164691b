"""The command line of a training run, and its configuration as YAML."""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import jsonargparse
import yaml

from apts_mpi import problems
from apts_mpi.options.methods import METHODS, options_of
from apts_mpi.tools.command import add_version
from apts_mpi.train.configuration import NAMES, expand
from apts_mpi.train.help import AFTER_COMMON, USAGE, CommonHelp, HelpAll
from apts_mpi.train.options import LATEST_OF_RUN, TrainingOptions
from apts_mpi.train.refusals import refuse

# Options that go without the name of their group, or by that alone: --global-step first-order.
SHORT_FORMS = {
    "--global_step": "--global_step.model",
    "--coarse": "--coarse.model",
    "--weight_decay": "--trust_region.weight_decay",
} | {
    f"--{name}": f"--pipeline.{name}"
    for name in ("micro_batches", "schedule", "cuts", "balance", "cache_dtype", "recompute")
}

# Options that need no value.
SWITCHES = (
    *("--overwrite", "--keep_best", "--checkpoint_in_background", "--view", "--monitor"),
    *("--log_view", "--trace", "--tensorboard"),
)


# Arguments of functions of the user's: their names are as they stand in the function.
OF_FUNCTIONS = r"--(problem|network)\.args\.([A-Za-z_]\w*)"
LISTS = ("problem_args", "network_args")


def make_parser() -> jsonargparse.ArgumentParser:
    """The parser: one option a field of `TrainingOptions`, nested groups with dots, ``--config FILE.yaml``."""
    parser = jsonargparse.ArgumentParser(
        prog="apts_mpi.train",
        description="Train a network over MPI ranks. Hyphens in names of options may be written for underscores.",
        usage=USAGE,
        formatter_class=CommonHelp,
        epilog=AFTER_COMMON,
        exit_on_error=False,
        # A beginning of a name would pass by what `spell` and `expand` do.
        allow_abbrev=False,
    )
    of_problems = f"Arguments of problems, --problem.args.NAME VALUE: {'; '.join(map(_arguments, problems.names()))}."
    parser.add_argument("--help_all", action=HelpAll, const=of_problems, help="Show all options, and exit.")
    add_version(parser)
    parser.add_argument("--config", action="config", help="Read options from a YAML file.")
    parser.add_class_arguments(TrainingOptions, as_group=False)
    return parser


def _names() -> list[str]:
    """Of all that the command line takes."""
    return [*NAMES, "config", *(form.removeprefix("--") for form in SHORT_FORMS)]


def _arguments(name: str) -> str:
    """A problem with the names of its arguments and their values where none are given."""
    return f"{name}: " + ", ".join(f"{argument}={value}" for argument, value in problems.arguments_of(name).items())


def spell(arguments: Sequence[str]) -> list[str]:
    """Options as the parser knows them: underscores for hyphens, short forms and switches written out."""
    spelled: list[str] = []
    waiting = False
    for argument, following in itertools.pairwise([*arguments, ""]):
        if waiting:
            # The value of an argument of a function.
            spelled[-1] += f"={argument}"
            waiting = False
            continue
        if re.match(OF_FUNCTIONS + "(=|$)", argument):
            waiting = "=" not in argument
        elif match := re.match(r"--([A-Za-z][^=]*)", argument):
            name = "--" + match.group(1).replace("-", "_")
            argument = SHORT_FORMS.get(name, name) + argument[match.end() :]
            if argument in SWITCHES and following not in ("true", "false"):
                argument += "=true"
            if argument == "--resume" and (not following or following.startswith("-")):
                argument += f"={LATEST_OF_RUN}"
        spelled.append(argument)
    return spelled


def of_method(arguments: Sequence[str]) -> list[str]:
    """The options of the method that is named last among arguments; they come before what is given."""
    name = None
    for argument, following in itertools.pairwise([*arguments, ""]):
        option, equals, value = argument.partition("=")
        if option == "--method":
            name = value if equals else following
    if name not in METHODS:
        return []  # or else the parser refuses it
    return [f"--{option}={written(value)}" for option, value in options_of(name).items()]


def _divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that name configuration files, and the others."""
    files: list[str] = []
    others: list[str] = []
    waiting = iter([*arguments])
    for argument in waiting:
        if argument == "--config":
            files += [argument, next(waiting, "")]
        else:
            (files if argument.startswith("--config=") else others).append(argument)
    return files, others


def written(value: Any) -> str:
    """A value as the command line has it."""
    return value if isinstance(value, str) else json.dumps(value)


def gather(arguments: Sequence[str]) -> list[str]:
    """Arguments with those of functions of the user's, ``--problem.args.NAME=VALUE``, in lists of their own."""
    rest: list[str] = []
    found: dict[str, dict[str, str]] = {}
    for argument in arguments:
        option, _, value = argument.partition("=")
        listed = option.removeprefix("--")
        if match := re.fullmatch(OF_FUNCTIONS, option):
            found.setdefault(match[1], {})[match[2]] = value
        elif listed in LISTS and (given := _pairs(value)) is not None:
            found.setdefault(listed.removesuffix("_args"), {}).update(given)
        else:
            rest.append(argument)
    lists = {name: [f"{each}={value}" for each, value in given.items()] for name, given in found.items()}
    return [*rest, *(f"--{name}_args={json.dumps(given)}" for name, given in lists.items())]


def _pairs(text: str) -> dict[str, str] | None:
    """Names and values in a list of NAME=VALUE; None for another text, which the parser refuses."""
    try:
        given = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # also for numbers of thousands of digits
        return None
    if not isinstance(given, list) or not all(isinstance(each, str) and "=" in each for each in given):
        return None
    return {name: value for name, _, value in (each.partition("=") for each in given)}


def parse(arguments: Sequence[str], earlier: Sequence[str] = ()) -> tuple[TrainingOptions, str]:
    """The options, and the configuration as YAML that makes the same run again in a new directory.

    Parameters
    ----------
    arguments
        Of the command line.
    earlier
        Arguments of a run that is resumed, as `apts_mpi.train.resume.saved_arguments` gives them, which these change.

    Raises
    ------
    InvalidInput
        For an option or a value that is not known.
    """
    parser = make_parser()
    try:
        spelled = spell(arguments)
        # A method that the command line names is meant to change what a configuration file has.
        files, others = _divided(spelled) if of_method(spelled) else ([], spelled)
        others = expand(others)
        given = [*expand(files), *of_method(others), *others]
        parsed = parser.parse_args(gather([*earlier, *given]))
    except (argparse.ArgumentError, TypeError) as error:
        raise refuse(error, TrainingOptions, _names()) from error
    values = dict(vars(parser.instantiate(parsed)))
    del values["config"]
    parsed.run_dir, parsed.resume, parsed.overwrite = None, None, False
    return TrainingOptions(**values), parser.dump(parsed)
