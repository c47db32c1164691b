"""``--help`` shows what people need, ``--help-all`` all that there is."""

import pytest

from apts_mpi.train.configuration import NAMES
from apts_mpi.train.help import SECTIONS
from apts_mpi.train.parser import parse

COMMON, OTHERS = ([name for section in SECTIONS.values() for name in section[part]] for part in (0, 1))


def test_each_option_beside_the_parts_of_the_solver_is_in_one_section():
    assert sorted([*COMMON, *OTHERS]) == sorted(name for name in NAMES if "." not in name)
    assert 18 <= len(COMMON) <= 24


@pytest.mark.parametrize(("asked", "names"), [("--help", COMMON), ("--help-all", sorted(NAMES))])
def test_help(capsys, monkeypatch, asked, names):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        parse([asked])
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
    own = {"help_all", "version", "config", "print_config"}
    assert not ended.value.code and all(len(line) <= 80 or "{" in line for line in lines)
    assert sorted(set(shown) - own - {name.partition(".")[0] for name in NAMES if "." in name}) == sorted(names)
    assert [f"{title}:" for title in SECTIONS] == [line for line in lines if line[:-1] in SECTIONS]
