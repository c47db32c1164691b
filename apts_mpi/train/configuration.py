"""Configurations in YAML as arguments of the command line, which say what they mean and name nothing to be read.

The text is read as data: names of options, and texts of values. Whatever else is in it is refused, by its name. The
parser then treats the values as it does those of the command line.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_type_hints

import yaml

from apts_mpi.errors import InvalidInput, shortened, shown
from apts_mpi.train.options import TrainingOptions

NULL = "null"

# What YAML calls the scalars that a value may be.
SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "timestamp")}

HELP = "--help lists the options"


def option_names() -> tuple[set[str], set[str]]:
    """Names of all options, with the dots of those in groups; and of the groups."""
    names, groups = set(), set()
    for name, kind in get_type_hints(TrainingOptions).items():
        if dataclasses.is_dataclass(kind):
            groups.add(name)
            names |= {f"{name}.{field.name}" for field in dataclasses.fields(kind)}
        else:
            names.add(name)
    return names, groups


NAMES, GROUPS = option_names()


def expand(arguments: Sequence[str]) -> list[str]:
    """Arguments with options in the places of configuration files and of groups; the last of an option counts.

    Raises
    ------
    InvalidInput
        For a file that cannot be read, or that is no configuration.
    """
    expanded: list[str] = []
    waiting = iter(itertools.zip_longest(arguments, arguments[1:]))
    for argument, following in waiting:
        name, equals, value = argument.removeprefix("--").partition("=")
        is_special = argument.startswith("--") and (name == "config" or name in GROUPS)
        if not is_special or (not equals and following is None):
            expanded.append(argument)
            continue
        if not equals:
            value = next(waiting)[0]
        expanded += read_file(value) if name == "config" else read_text(f"{name}: {value}", name)
    return expanded


def given_options(arguments: Sequence[str]) -> set[str]:
    """Names of the options among arguments that `expand` has returned."""
    return {argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")}


def read_file(path: str) -> list[str]:
    """The options in a file, as arguments; raises as `expand` does."""
    place = f"config: {shown(path)}"
    try:
        text = Path(path).read_bytes().decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise InvalidInput(f"{place} cannot be read ({reason}); give a YAML file") from error
    return read_text(text, place)


def read_text(text: str, place: str) -> list[str]:
    """The options in a YAML text, as arguments.

    Parameters
    ----------
    text
        A mapping of options and groups to values and further mappings.
    place
        Where it stands, for messages.

    Raises
    ------
    InvalidInput
        If it is no such mapping; for an option that is not known or is given twice.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{place}: it is no YAML ({_reason(error)}); give lines such as 'epochs: 5'") from error
    if not isinstance(node, yaml.MappingNode) or not node.value:
        raise InvalidInput(f"{place}: it names no options; give lines such as 'epochs: 5'")
    options: dict[str, str] = {}
    for name, value in _leaves(node, "", place):
        if name in options:
            raise InvalidInput(f"{place}: {shown(name)} is given twice; leave one of them out")
        options[name] = value
    return [f"--{name}={value}" for name, value in options.items()]


def _reason(error: Exception) -> str:
    """What of a text is no YAML, and where."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return shortened(" ".join(str(error).split()), 200)
    mark = error.problem_mark
    return f"{shortened(error.problem or '', 200)}, line {mark.line + 1}, column {mark.column + 1}"


def _leaves(mapping: yaml.MappingNode, prefix: str, place: str) -> Iterator[tuple[str, str]]:
    """Options and the texts of their values, in their order."""
    for key, value in mapping.value:
        name = prefix + (key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping")
        if name in GROUPS and isinstance(value, yaml.MappingNode):
            yield from _leaves(value, f"{name}.", place)
        elif name in GROUPS:
            raise InvalidInput(f"{place}: {name} is a group of options; give lines such as '{_member(name)}: VALUE'")
        elif name not in NAMES:
            raise InvalidInput(f"{place}: {shown(name)} is not accepted; {HELP}")
        else:
            yield name, _text(value, name, place)


def _member(group: str) -> str:
    """The first option of a group."""
    return f"{group}.{dataclasses.fields(get_type_hints(TrainingOptions)[group])[0].name}"


def _text(value: yaml.Node, name: str, place: str) -> str:
    """A value as the command line has it."""
    if isinstance(value, yaml.ScalarNode) and value.tag in SCALARS:
        return NULL if value.tag.endswith(":null") else value.value
    if isinstance(value, yaml.SequenceNode):
        items = [item for item in value.value if isinstance(item, yaml.ScalarNode) and item.tag in SCALARS]
        if len(items) == len(value.value):
            return json.dumps([item.value for item in items])
    raise InvalidInput(f"{place}: {name} is neither a value nor a list of values; {HELP} and their values")
