"""The commands and programs in README.md and docs/*.md are run as they stand there.

Each page has a copy of the working tree, in which its blocks are run in their order; so a block may use what those
before it on the page have made. Blocks ```bash are run with what `COMMANDS` appends to each line, ```python as a
program (one that begins with ``# NAME.py`` is that file), and ```diff changes the copy. A block in another language
fails, and a command that no line of the tables knows. Commands within the text, in backticks, are only parsed.
"""

import configparser
import importlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from processes import TESTS, find_mpirun, needs_mpirun

from apts_mpi.tools.environment import outside_job
from apts_mpi.train import parser as train

ROOT = TESTS.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LIMIT = 300  # seconds a block; most take less than ten, if the cores are not busy

# How a command of a bash block begins, and what is appended to make it short; variables and a launcher before it do not
# count. Of several that fit the first one does.
COMMANDS = {
    "python -m apts_mpi.train --help": "",
    "python -m apts_mpi.train": "--max-iterations 2",
    "apts-train": "--max-iterations 2",
    "bash jobs/local_train.sh": "--max-iterations 2",
    "bash jobs/local_test.sh": "tests/trust_region",
    "python -m apts_mpi.bench iteration": "--repetitions 1 --rounds 1 --problems mlp-256",
    "python -m apts_mpi.compare poisson-1d": "--equal-seconds 0.1 --seeds 1 --methods spring,broyden",
    "python -m apts_mpi.compare continual": "--epochs 1 --train-samples 120",
    "python -m apts_mpi.compare papers": "--epochs 1 --seeds 1 --methods iapts --subdomains 2",
    "python -m apts_mpi.compare": "--epochs 2 --seeds 1",
    "python -m apts_mpi.bench balance": "--rounds 1",
    "python -m apts_mpi.bench events": "--repetitions 1",
    "python -m apts_mpi.bench memory": "--width 16",
    "python -m apts_mpi.bench pipeline": "--width 16 --samples 64 --repetitions 1",
    "python -m apts_mpi.bench checkpoint": "--megabytes 1 --repetitions 1",
    "python -m apts_mpi.bench faults": "--seconds 1 --ranks 2",
    "python -m apts_mpi.checkpoint diff": "|| [ $? -eq 1 ]",  # the status where files differ
    "python -m apts_mpi.checkpoint": "",
    "python -m apts_mpi.doctor": "",
    "python -m apts_mpi.plot": "",
    "python -m apts_mpi.scaling subdomains": "--layers 4 --subdomains 2 --largest 2 --loss 2.0 --width 8",
    "python -m apts_mpi.scaling run": "--max-iterations 3",  # the last options there are those of the runs
    "python -m apts_mpi.scaling": "",
    "python program.py": "",
    "python docs/examples/": "",
    "pip install": "--dry-run --no-deps --quiet",
    "bash jobs/gpu_check.sh": "",
    # With a stand-in for the scheduler.
    "bash jobs/submit_": "",
}

# Commands that are not run here, and what does. Their syntax is checked, and that the scripts are there.
NOT_RUN = {
    "pip install torch --index-url": "jobs/local_environment.sh, from the same index",
    "pip install --no-binary mpi4py": "jobs/local_environment.sh, where an MPI is active",
    "python docs/look_at_pages.py": ".ci/run",
    "python docs/take_screens.py": "whoever changes what commands print; see test_screens.py",
    "bash jobs/setup_parallel_hdf5.sh": ".ci/run",
    "source .venv-parallel-hdf5/bin/activate": ".ci/run",
    "bash .ci/run": "whoever changes something",
    # It would remove what is not of these tests.
    "python -m apts_mpi.doctor --clear-shared-memory": "tests/doctor/test_shared_memory.py",
    "sphinx-build": ".ci/run",
    "pytest tests/slurm": ".ci/run",
    "python -m apts_mpi.scaling simulate": "tests/scaling/test_simulate.py, where SimGrid is",
    "python -m apts_mpi.scaling gpt --simulate": "tests/scaling/test_simulate.py, smaller ones",
    "python -m pytest": "jobs/local_test.sh, and whoever has a GPU",
    "tensorboard": "whoever looks at curves",
}

# Words in capitals that a reader replaces.
PLACEHOLDERS = {
    **{"RATE": "1e-2", "ITERATIONS": "10", "STEPS": "10", "SECONDS": "10", "SEED": "0", "N": "2"},
    **{"PROBLEM": "digits", "RUN…": "run", "NAME": "name"},
}

# Of languages that are not run.
SHOWN = {"text", "yaml", "{toctree}", "{eval-rst}", "{math}", "{literalinclude}"}

SITE = """
scheduler=slurm account= partition= submit_options=()
gpus_per_node=4 ranks_per_node=4 cores_per_node=32 warning=60
choose_launcher() { launcher=(mpirun -n "$RANKS"); }
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its number from 1, language and text."""

    page: Path
    number: int
    language: str
    text: str

    def __str__(self):
        return f"{self.page.stem}-{self.number}-{self.language}"


def blocks_of(page):
    fences = re.findall(r"^ *(`{3,}|~{3,})[ ]*(\S*)[^\n]*\n(.*?)^ *\1 *$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(page, number, language, text) for number, (_, language, text) in enumerate(fences, 1)]


def inline_commands(page):
    """Commands in backticks within the text, on one line each."""
    text = re.sub(r"^ *(`{3,}|~{3,}).*?^ *\1 *$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
        command = " ".join(code.split())
        if re.match(r"(?:[A-Z_]+=\S* |mpirun -n \S+ )*(?:python -m apts_mpi|apts-train|bash |pip |pytest )", command):
            yield command


BLOCKS = list(itertools.chain.from_iterable(map(blocks_of, PAGES)))
RUN = [block for block in BLOCKS if block.language not in SHOWN]
INLINE = [(page, command) for page in PAGES for command in inline_commands(page)]


def bare(command):
    """A command without the variables and the launcher before it, and without the comment after it."""
    command = re.sub(r"\s#\s.*", "", command).strip()
    return re.sub(r"^(?:[A-Z_]+=(?:\"[^\"]*\"|\S*) +)*(?:mpirun -n \S+ +)?", "", command)


def fitting(command, table):
    """The line of a table for a command, or None."""
    return next((start for start in table if bare(command).startswith(start)), None)


def shortened(block):
    """The script of a bash block as it is run."""
    lines = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if not bare(line) or fitting(line, NOT_RUN):
            continue
        start = fitting(line, COMMANDS)
        assert start, f"no line of COMMANDS or NOT_RUN is for: {line}"
        code, _, comment = line.partition(" # ")
        lines.append(f"{code.rstrip()} {COMMANDS[start]}" + (f"  # {comment}" if comment else ""))
    return "\n".join(lines)


@dataclass
class Copy:
    """A copy of the working tree, with the environment of these tests in the place of .venv."""

    path: Path
    done: set = field(default_factory=set)

    def make(self):
        unused = shutil.ignore_patterns(".*", "runs", "build", "comparisons", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, self.path, ignore=unused)
        programs = self.path / ".venv" / "bin"
        programs.mkdir(parents=True)
        settings = configparser.ConfigParser()
        settings.read(ROOT / "setup.cfg")
        name, function = settings["options.entry_points"]["console_scripts"].strip().split(" = ")
        module, function = function.split(":")
        for program, command in {
            "python": f'{sys.executable} "$@"',
            "pip": f'{sys.executable} -m pip "$@"',
            "mpirun": f'{find_mpirun()} "$@"',
            name: f"{sys.executable} -c 'from {module} import {function}; {function}()' \"$@\"",
            "sbatch": "echo 1",
        }.items():
            (programs / program).write_text(f"#!/usr/bin/env bash\nexec {command}\n")
            (programs / program).chmod(0o755)
        (programs / "sbatch").write_text("#!/usr/bin/env bash\ncat >/dev/null\necho 1\n")
        (self.path / "site.sh").write_text(SITE)
        # As if jobs/local_environment.sh had made it.
        self.call("source jobs/local_environment.sh; describe_requirements >.venv/set_up")

    def call(self, script):
        """Run a script of bash in the copy."""
        environment = outside_job() | {
            "PATH": f"{self.path / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.path),
            "OMP_NUM_THREADS": "1",
            "VENV": ".venv",
            "RANKS": "2",
            "SIZES": "1",
            "SITE": str(self.path / "site.sh"),
        }
        done = subprocess.run(
            ["timeout", "--kill-after=10", str(LIMIT), "bash", "-euo", "pipefail", "-c", script],
            cwd=self.path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"status {done.returncode}\n{script}\n{done.stdout[-6000:]}"

    def run(self, block):
        if block.language == "bash":
            self.call(shortened(block))
        elif block.language == "diff":
            (self.path / "block.diff").write_text(block.text)
            self.call("patch --strip=1 --input=block.diff")
        else:
            named = re.match(r"# (\S+\.py)\n", block.text)
            file = named[1] if named else "block.py"
            (self.path / file).write_text(block.text)
            self.call(f"python {file}")

    def run_up_to(self, block):
        """Run the blocks before it that did not run yet; whether they pass is for their own tests to say."""
        for earlier in blocks_of(block.page)[: block.number - 1]:
            if earlier.number not in self.done and earlier.language not in SHOWN:
                self.done.add(earlier.number)
                try:
                    self.run(earlier)
                except AssertionError as error:
                    print(f"earlier block {earlier}: {error}")
        self.done.add(block.number)
        self.run(block)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """The copy of each page, made when it is first asked for."""
    made = {}

    def of(page):
        if page not in made:
            made[page] = Copy(tmp_path_factory.mktemp(page.stem) / "apts_mpi")
            made[page].make()
        return made[page]

    return of


@pytest.mark.processes
@pytest.mark.slow
@needs_mpirun
@pytest.mark.parametrize("block", RUN, ids=str)
def test_block(block, copies):
    assert block.language in ("bash", "python", "diff"), f"write one of these, or one of {sorted(SHOWN)}, behind ```"
    copy = copies(block.page)
    copy.run_up_to(block)
    if block.language == "bash":
        check_parts_not_run(block)
        for tasks in copy.path.glob("runs/**/tasks"):  # of the jobs that were submitted
            for line in tasks.read_text().splitlines():
                train.parse(shlex.split(line))


def check_parts_not_run(block):
    subprocess.run(["bash", "-n", "-c", block.text], check=True)
    for line in block.text.splitlines():
        if fitting(line, NOT_RUN):
            check_scripts(bare(line))


def check_scripts(command):
    for word in shlex.split(command):
        is_path = "/" in word.partition(":")[0]  # as it is not in fat-tree:12.5GB/s
        if is_path and not word.startswith((".venv", "runs/", "build/")):
            assert (ROOT / word).exists(), f"there is no {word}"


@pytest.mark.parametrize("page, command", INLINE, ids=lambda value: getattr(value, "stem", value))
def test_inline_command(page, command):
    """It would be taken: scripts are there, options and their values are known."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(bare(command))]
    words = list(itertools.takewhile(lambda word: word != "--", words))  # what follows is for another program
    if words[0] == "apts-train":
        words = ["python", "-m", "apts_mpi.train", *words[1:]]
    if words[0] != "python":
        assert fitting(command, NOT_RUN | COMMANDS), f"no line of COMMANDS or NOT_RUN is for: {command}"
        check_scripts(shlex.join(words[:2]))
        words = ["python", "-m", "apts_mpi.train", *words[2:]] if words[1] == "jobs/local_train.sh" else []
    if words[3:] or words[2:] == ["apts_mpi.train"]:
        place = "parser" if words[2] == "apts_mpi.train" else "__main__"
        module = importlib.import_module(f"{words[2]}.{place}")
        try:
            module.parse(words[3:])
        except SystemExit as end:
            assert not end.code, f"{command} is not taken"


def test_every_page_has_something_to_check():
    assert {block.page.name for block in RUN} >= {"README.md", "index.md", "options.md", "your-own-problem.md"}
    assert len(INLINE) > 5
