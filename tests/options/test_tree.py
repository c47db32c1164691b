"""Options as a tree: what is marked, what is named, and how wide it is."""

from dataclasses import replace

from apts_mpi.options import CoarseOptions, SchwarzOptions
from apts_mpi.options.tree import branch, fold


def lines_of(options, asked):
    name, *lines = branch("group", options, asked)
    assert name == "  group"
    return {line.split()[1 if "*" in line else 0]: line for line in lines}


def test_what_differs_from_the_default_is_marked():
    asked = CoarseOptions(damping=0.5, columns=("correction", "gradient"))
    lines = lines_of(replace(asked, model="gauss-newton", norm="2", samples=1.0), asked)
    assert list(lines) == list(CoarseOptions.__dataclass_fields__)
    assert lines["damping"] == "    * damping          0.5 (default: 0.1)"
    assert lines["columns"].endswith("[correction, gradient] (default: [correction, last_step])")
    assert lines["model"] == "      model            gauss-newton (for auto)"
    assert lines["samples"].endswith(" 1.0 (for null)") and lines["momentum"].endswith(" 0.0")
    assert [name for name, line in lines.items() if "*" in line] == ["columns", "damping"]


def test_what_was_asked_for_and_is_not_had_is_named():
    asked = SchwarzOptions(local_data="shard")
    line = lines_of(replace(asked, local_data="full"), asked)["local_data"]
    assert line == "    * local_data       full (for shard, default: auto)"


def test_lines_fit_a_narrow_terminal():
    asked = SchwarzOptions(cuts=tuple(range(0, 10**6, 10**4)))
    (cuts,) = [line for line in branch("group", asked, asked) if " cuts " in line]
    parts = cuts.split("\n")
    assert len(parts) > 5 and all(len(part) <= 80 for part in parts)
    assert "".join("".join(parts).split()) == "*cuts" + str(list(asked.cuts)).replace(" ", "") + "(default:null)"
    assert fold("  short") == "  short" and fold(f"  {'x' * 100} y") == f"  {'x' * 100}\n      y"
