"""Take the screens that the pages show: ``python docs/take_screens.py`` writes ``docs/screens/NAME-WIDTH.txt``.

Real commands are run with 80 and with 140 columns, in an empty directory. Names of the host and of the directory are
replaced by others of the same length, colours are left out, and of what is rewritten the terminal's last state counts.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PLACE = Path(__file__).parent / "screens"
WIDTHS = (80, 140)
LIMIT = 120  # seconds a command

TRAIN = "mpirun -n 2 python -m apts_mpi.train --problem digits --run-dir runs/digits --overwrite"


@dataclass(frozen=True)
class Screen:
    """A command, and from where to where its output is shown: patterns of where that begins and of what follows."""

    command: str
    begin: str = ""
    end: str = r"\Z"


SCREENS = {
    "epochs": Screen(f"{TRAIN} --epochs 5"),
    "live": Screen(f"{TRAIN} --epochs 20 --progress always", end=r"\r\x1b\[2Kepoch 7 "),
    "solver": Screen(f"{TRAIN} --epochs 1 --view --local.damping 0.5", end=r"^ +seconds"),
    "events": Screen(f"{TRAIN} --epochs 5 --log-view", begin=r"^ +events of", end=r"^records:"),
    "doctor": Screen("mpirun -n 2 python -m apts_mpi.doctor"),
}


def run(command: str, width: int) -> str:
    """What a command prints on so many columns, with names of this machine replaced."""
    with tempfile.TemporaryDirectory() as directory:
        surroundings = {name: value for name, value in os.environ.items() if "COLOR" not in name}
        surroundings |= {"COLUMNS": str(width), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
        done = subprocess.run(
            shlex.split(command),
            cwd=directory,
            env=surroundings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=LIMIT,
            check=True,
        )
    host = platform.node()
    output = re.sub(rf"\b{re.escape(host)}\b", f"n{'1'.rjust(len(host) - 1, '0')}", done.stdout.decode())
    return output.replace(directory, "/home/you/digits".ljust(len(directory), "s")[: len(directory)])


def shown(output: str, screen: Screen) -> list[str]:
    """The lines of a terminal that has drawn what is to be shown of an output."""
    begin, end = (re.compile(pattern, re.MULTILINE) for pattern in (screen.begin, screen.end))
    start = next(begin.finditer(output)).start()
    stop = next(end.finditer(output, start)).start()
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output[start:stop]):
        if part == "\n":
            row += 1
            lines[row:] = lines[row:] or [""]
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith(("\x1b", "\r")):
            lines[row] += part
    return [line.rstrip() for line in lines]


def take(name: str, width: int) -> None:
    """Run the command of a screen and write the screen."""
    screen = SCREENS[name]
    lines = shown(run(screen.command, width), screen)
    text = "\n".join(lines).strip("\n")
    (PLACE / f"{name}-{width}.txt").write_text(f"{text}\n", encoding="utf-8")


def main(names: list[str]) -> None:
    """Take the screens with these names, or all."""
    PLACE.mkdir(exist_ok=True)
    for name in names or SCREENS:
        for width in WIDTHS:
            take(name, width)


if __name__ == "__main__":
    main(sys.argv[1:])
