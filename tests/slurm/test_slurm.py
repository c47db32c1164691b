"""The scripts in jobs/ under a real Slurm of this one machine.

Where Slurm is not installed or cannot be started these tests skip, unless the environment variable SLURM_REQUIRED is
set: then they fail.
"""

import getpass
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
from mpi4py import MPI
from processes import TESTS, find_mpirun, needs_mpirun

from apts_mpi.checkpoint import Checkpoint
from apts_mpi.tools.environment import outside_job

pytestmark = [pytest.mark.slurm, pytest.mark.processes, pytest.mark.slow, needs_mpirun]

JOBS = TESTS.parent / "jobs"
CLUSTER = Path(__file__).parent / "cluster.sh"
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo")
LIMIT = 240  # seconds that jobs may take; some take ten, one about a minute

# Two ranks on nodes of two cores, started by mpirun or by Slurm itself.
SITE = """
scheduler=slurm account= partition= submit_options=()
gpus_per_node=0 ranks_per_node=2 cores_per_node=2 warning={warning}
load_environment() {{ python={python}; }}
choose_launcher() {{ launcher=({launcher}); }}
"""
SRUN = 'srun --wait=10 --mpi=pmi2 --ntasks="$RANKS" --cpus-per-task="$cores_per_rank" --cpu-bind=cores'

# Slow until Slurm begins the job again, so that it is told to stop within its first wall time and ends in its second.
SLOW = """
import os
import time

import networks


def problem():
    network, loss, data = networks.problem()

    def slow_loss(outputs, targets):
        if "SLURM_JOB_ID" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
            time.sleep(0.4)
        return loss(outputs, targets)

    return network, slow_loss, data
"""

SHORT = ["--problem=digits", "--device=cpu", "--max-iterations=5"]


@pytest.fixture(scope="module")
def cluster():
    """Slurm for the tests of this file: the environment in which its commands work."""
    searched = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = [command for command in COMMANDS if shutil.which(command, path=searched) is None]
    if missing:
        give_up(f"Slurm is not installed: no {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)")
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    started = subprocess.run(["bash", CLUSTER, "start", directory], capture_output=True, text=True)
    try:
        if started.returncode != 0:
            logs = "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in sorted(directory.glob("*.log")))
            give_up(f"Slurm cannot be started: {started.stderr}\n{logs}")
        environment = {name: value for name, value in outside_job().items() if not name.startswith("SBATCH_")}
        paths = [str(TESTS.parent), str(TESTS), environment.get("PYTHONPATH", "")]
        yield environment | {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }
    finally:
        subprocess.run(["bash", CLUSTER, "stop", directory], check=True)
        shutil.rmtree(directory)


def give_up(reason):
    if os.environ.get("SLURM_REQUIRED"):
        pytest.fail(reason)
    pytest.skip(reason)


class Site:
    """A directory from which jobs are submitted.

    Parameters
    ----------
    path
        The directory.
    environment
        Of the commands.
    """

    def __init__(self, path, environment):
        self.path = path
        self.environment = environment | {"SITE": str(path / "site.sh")}
        self.configure()

    def configure(self, launcher="", warning=20):
        """Write the settings; the launcher is mpirun unless another is given."""
        launcher = launcher or f'{find_mpirun()} -n "$RANKS"'
        text = SITE.format(launcher=launcher, warning=warning, python=sys.executable)
        (self.path / "site.sh").write_text(text)

    def call(self, script, *arguments, **variables):
        """Run a script of jobs/."""
        return self.run("bash", JOBS / script, *arguments, **variables)

    def run(self, *command, **variables):
        return subprocess.run(
            command, cwd=self.path, env=self.environment | variables, capture_output=True, text=True, timeout=LIMIT
        )

    def submit(self, script, *arguments, **variables):
        """Submit; return the number of the job."""
        done = self.call(script, *arguments, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def wait(self, name):
        """Wait until no job is left; return what the jobs wrote."""
        deadline = time.monotonic() + LIMIT
        while jobs := self.run("squeue", "--noheader").stdout:
            if time.monotonic() > deadline:
                pytest.fail(f"after {LIMIT} s there still are the jobs\n{jobs}{self.output(name)}")
            time.sleep(0.5)
        return self.output(name)

    def output(self, name):
        return "\n".join(path.read_text() for path in sorted((self.path / "runs" / name).rglob("job-*.txt")))


@pytest.fixture
def site(cluster, tmp_path):
    site = Site(tmp_path, cluster)
    yield site
    site.run("scancel", f"--user={getpass.getuser()}")


def summary(path):
    return json.loads((path / "summary.json").read_text())


def records(path):
    """The history without what depends on time."""
    lines = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "cpu_seconds")} for line in lines]


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_two_ranks_to_the_end(site, launcher):
    if launcher == "srun":
        if MPI.get_vendor()[0] != "MPICH":
            pytest.skip("Debian's Slurm starts MPICH without its launcher, other libraries not")
        site.configure(launcher=SRUN)
    path = site.path / "runs" / "short"
    # One start by srun in twenty fails in MPI_Init, whatever the program: an address that MPICH exchanges by Debian's
    # Slurm comes out wrong.
    for _ in range(4):
        site.submit("submit_train.sh", *SHORT, NAME="short", RANKS="2")
        output = site.wait("short")
        if (
            launcher == "mpirun"
            or "Fatal error in internal_Init_thread" not in output
            or (path / "summary.json").exists()
        ):
            break
    assert (path / "summary.json").exists(), output
    assert summary(path)["ranks"] == 2 and summary(path)["iterations"] == 5
    assert output.count("accepted steps") == 1


def test_signalled_before_the_wall_time(site):
    """Slurm signals, the run saves, is requeued, goes on, and comes to what an uninterrupted run comes to."""
    # Slurm looks at its clock every 30 seconds and signals early rather than late: 25 to 55 seconds after the start.
    site.configure(warning=65)
    (site.path / "slow.py").write_text(SLOW)
    arguments = (
        "--problem=slow:problem --dtype=float64 --device=cpu --epochs=100000 --max-iterations=100 --batch-size=30 "
        "--subdomains=2 --local.solver=sgd --trust-region.window=3"
    ).split()
    job = site.submit("submit_train.sh", *arguments, NAME="slow", RANKS="2", WALLTIME="00:02:00")
    done = site.run(
        find_mpirun(), "-n", "2", sys.executable, "-m", "apts_mpi.train", *arguments, "--run-dir=whole",
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    output = site.wait("slow")
    resumed, whole = site.path / "runs" / "slow", site.path / "whole"
    # On a slow machine it may take more than two wall times.
    stops = output.count("SIGUSR1 was received")
    assert stops >= 1, output
    assert [f"job {job}, restart {count}" in output for count in range(stops + 2)] == [True] * (stops + 1) + [False]
    assert output.count("resumed after iteration") == stops
    assert records(resumed) == records(whole)
    with Checkpoint(resumed / "checkpoints" / "latest") as one, Checkpoint(whole / "checkpoints" / "latest") as other:
        names = [name for name in other.names if name.startswith(("parameters/", "solver/"))]
        assert names
        for name in names:
            np.testing.assert_array_equal(one.read(name), other.read(name))


def test_array_of_three(site):
    site.submit("submit_array.sh", "seed=0,1,2", "--", *SHORT, NAME="seeds", RANKS="1")
    output = site.wait("seeds")
    paths = [site.path / "runs" / "seeds" / f"seed={seed}" for seed in range(3)]
    assert all((path / "summary.json").exists() for path in paths), output
    assert len({summary(path)["train_loss"] for path in paths}) == 3


@pytest.mark.parametrize("kind", ["strong", "weak"])
def test_scaling_study(site, kind):
    site.submit("submit_scaling.sh", kind, *SHORT, NAME=kind, SIZES="1 2", SAMPLES_PER_RANK="100")
    output = site.wait(kind)
    path = site.path / "runs" / kind
    assert (path / "scaling.json").exists(), output
    report = json.loads((path / "scaling.json").read_text())
    assert report["unfinished"] == []
    one, two = report["sizes"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert two["batch_size"] == (200 if kind == "weak" else one["batch_size"])
    if kind == "strong":
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-3)  # float32, summed in another order
    assert "speed-up" in output and "efficiency" in output


def test_study_with_a_run_that_fails(site):
    """The report is made all the same, names the run and fails."""
    site.submit("submit_scaling.sh", "strong", *SHORT, "--problem=nowhere:problem", NAME="failing", SIZES="1")
    output = site.wait("failing")
    assert "none of the runs has a summary.json" in output
    assert not (site.path / "runs" / "failing" / "scaling.json").exists()


class Refused(NamedTuple):
    script: str
    message: str
    arguments: tuple = ()
    variables: Mapping[str, str] = MappingProxyType({})


REFUSED = [
    Refused("submit_train.sh", "RANKS: 3 do not fill nodes of 2", variables={"RANKS": "3"}),
    Refused("submit_train.sh", "RANKS: 'none' is not a number", variables={"RANKS": "none"}),
    Refused("submit_train.sh", "WALLTIME: '90' is not a time", variables={"WALLTIME": "90"}),
    Refused("submit_train.sh", "is within the 20 seconds of warning", variables={"WALLTIME": "00:00:20"}),
    Refused("submit_train.sh", "the job sets this option itself", arguments=("--run-dir=here",)),
    Refused("submit_array.sh", "no OPTION=VALUE", arguments=("--", "--problem=digits")),
    Refused("submit_array.sh", "'--seed' is not OPTION=VALUE", arguments=("--seed", "0")),
    Refused("submit_scaling.sh", "SIZES is not given", arguments=("strong",)),
    Refused("submit_scaling.sh", "SAMPLES_PER_RANK: give", arguments=("weak",), variables={"SIZES": "1 2"}),
    Refused("submit_scaling.sh", "'neither' is not a kind", arguments=("neither",), variables={"SIZES": "1 2"}),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.message)
def test_bad_input_submits_nothing(site, case):
    done = site.call(case.script, *case.arguments, **case.variables)
    assert done.returncode == 1 and case.message in done.stderr and done.stdout == ""
    assert site.run("squeue", "--noheader").stdout == ""
