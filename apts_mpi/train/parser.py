"""The command line of a training run, and its configuration as YAML."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jsonargparse

from apts_mpi.errors import InvalidInput, require, require_choice, shortened, shown
from apts_mpi.tools.command import add_version
from apts_mpi.train.configuration import expand
from apts_mpi.train.options import LATEST_OF_RUN, TrainingOptions

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


# Characters of what the parser says.
LONGEST_MESSAGE = 600


def make_parser() -> jsonargparse.ArgumentParser:
    """The parser: one option a field of `TrainingOptions`, nested groups with dots, ``--config FILE.yaml``."""
    parser = jsonargparse.ArgumentParser(
        prog="apts_mpi.train",
        description="Train a network over MPI ranks. Hyphens in names of options may be written for underscores.",
        exit_on_error=False,
        # A beginning of a name would pass by what `spell` and `expand` do.
        allow_abbrev=False,
    )
    add_version(parser)
    parser.add_argument("--config", action="config", help="Read options from a YAML file.")
    parser.add_class_arguments(TrainingOptions, as_group=False)
    return parser


def spell(arguments: Sequence[str]) -> list[str]:
    """Options as the parser knows them: underscores for hyphens, short forms and switches written out."""
    spelled: list[str] = []
    for argument, following in itertools.pairwise([*arguments, ""]):
        if match := re.match(r"--([A-Za-z][^=]*)", argument):
            name = "--" + match.group(1).replace("-", "_")
            argument = SHORT_FORMS.get(name, name) + argument[match.end() :]
            if argument in SWITCHES and following not in ("true", "false"):
                argument += "=true"
            if argument == "--resume" and (not following or following.startswith("-")):
                argument += f"={LATEST_OF_RUN}"
        spelled.append(argument)
    return spelled


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
        parsed = parser.parse_args([*earlier, *expand(spell(arguments))])
    except (argparse.ArgumentError, TypeError) as error:
        _refuse_value(str(error))
        raise InvalidInput(f"{short_message(error)}; --help lists the options and their values") from error
    values = dict(vars(parser.instantiate(parsed)))
    del values["config"]
    parsed.run_dir, parsed.resume, parsed.overwrite = None, None, False
    return TrainingOptions(**values), parser.dump(parsed)


def short_message(error: Exception) -> str:
    """What the parser says on one line, with the beginnings of long values."""
    words = (shortened(word) if word.isprintable() else shown(word) for word in str(error).split())
    return shortened(" ".join(words), LONGEST_MESSAGE)


def _refuse_value(message: str) -> None:
    """Raise `InvalidInput` with the choices, for the parser's message on a value of an option that has some."""
    found = re.match(r'Parser key "([\w.]+)":.*Got value: (.*)', message, re.DOTALL)
    if found is None:
        return
    option, value = found.groups()
    kind: Any = TrainingOptions
    for name in option.split("."):
        kind = get_type_hints(kind).get(name, object)
    if get_origin(kind) is Literal:
        require_choice(option, value, get_args(kind))
    if get_origin(kind) is tuple:
        names = get_args(get_args(kind)[0])
        remedy = f"give a list of {', '.join(names)}, such as [{','.join(names[:2])}]"
        require(False, option, value, remedy)
