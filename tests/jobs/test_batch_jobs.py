"""What the scripts in jobs/ hand to PBS Pro and LSF, and what their jobs do.

Neither can be installed freely: a stand-in keeps what a real one would get, and the test runs the script that was
submitted. `slurm/test_slurm.py` uses a real Slurm.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from processes import TESTS

from apts_mpi.tools.environment import outside_job

pytestmark = pytest.mark.processes

JOBS = TESTS.parent / "jobs"

SITE = """
scheduler={scheduler} account=physics partition=gpu submit_options=(--extra)
gpus_per_node=4 ranks_per_node=4 cores_per_node=32 warning=60
load_environment() {{ python={python}; }}
choose_launcher() {{ launcher=(env -u APTS_MPI_RANKS OMP_NUM_THREADS=1); }}  # one rank, which is not to mind

"""

# Keeps its arguments and the script from its input, by number.
STAND_IN = """#!/usr/bin/env bash
number=$(($(ls {directory} | wc -l) / 2 + 1))
printf '%s\\n' "$@" >{directory}/arguments_$number
cat >{directory}/script_$number
echo {answer}
"""

SHORT = ["--problem=digits", "--device=cpu", "--max-iterations=2"]


class Scheduler:
    """A stand-in for a scheduler's command, and a directory from which jobs are submitted."""

    def __init__(self, path, name, command, answer):
        self.path, self.kept = path, path / "kept"
        self.kept.mkdir()
        (path / "site.sh").write_text(SITE.format(scheduler=name, python=sys.executable))
        (path / "bin").mkdir()
        program = path / "bin" / command
        program.write_text(STAND_IN.format(directory=self.kept, answer=answer))
        program.chmod(0o755)

    def call(self, *command, **variables):
        environment = outside_job() | {
            "SITE": str(self.path / "site.sh"),
            "PATH": f"{self.path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        }
        return subprocess.run(
            command, cwd=self.path, env=environment | variables, capture_output=True, text=True, timeout=100
        )

    def submit(self, script, *arguments, **variables):
        done = self.call("bash", JOBS / script, *arguments, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    def arguments(self, number):
        return (self.kept / f"arguments_{number}").read_text().splitlines()

    def start(self, number, **variables):
        """Run a submitted script, from another directory, as the scheduler does."""
        return self.call("bash", "-c", f"cd / && exec bash {self.kept}/script_{number}", **variables)


@pytest.fixture
def pbs(tmp_path):
    (tmp_path / "nodes").write_text("one\none\n")
    return Scheduler(tmp_path, "pbs", "qsub", "$number.server")


@pytest.fixture
def lsf(tmp_path):
    return Scheduler(tmp_path, "lsf", "bsub", '"Job <$number> is submitted to queue <gpu>."')


def summary(path):
    return json.loads((path / "summary.json").read_text())


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("submit_scaling.sh", {"SIZES": "4 6"}, "RANKS: 6 "),
        ("submit_scaling.sh", {"SIZES": "4 x"}, "SIZES: 'x' is not a number of ranks; give 1 or more"),
        ("submit_train.sh", {"SITE": "/nowhere"}, "SITE: '/nowhere' cannot be read; give a copy of jobs/site.sh"),
        (
            "submit_train.sh",
            {"SITE": "without", "RANKS": "2"},
            "ranks_per_node: '0' is not a number of ranks; give 1 or",
        ),
    ],
)
def test_what_cannot_be_submitted_leaves_no_job_behind(pbs, script, variables, message):
    (pbs.path / "without").write_text((pbs.path / "site.sh").read_text().replace("node=4", "node=0"))
    done = pbs.call("bash", JOBS / script, "strong", *SHORT, **variables)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert list(pbs.kept.iterdir()) == []


def test_job_with_gpus_does_not_compute_on_cpus_unnoticed(pbs):
    pbs.submit("submit_train.sh", "--problem=digits", "--max-iterations=2", NAME="first")
    done = pbs.start(1, PBS_JOBID="1.server", PBS_NODEFILE=str(pbs.path / "nodes"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0 and "device: 'cuda' was asked for, but torch finds no GPU" in done.stderr


def test_pbs_train(pbs):
    assert pbs.submit("submit_train.sh", NAME="first", RANKS="8", WALLTIME="02:00:00") == ["1.server"]
    assert pbs.arguments(1) == [
        "-N", "first", "-l", "walltime=02:00:00",
        "-l", "select=2:ncpus=32:mpiprocs=4:ompthreads=8:ngpus=4", "-l", "place=scatter",
        "-j", "oe", "-o", f"{pbs.path}/runs/first/", "-A", "physics", "-q", "gpu", "-r", "y", "--extra",
    ]  # fmt: skip


def test_pbs_array(pbs):
    """A grid is done in full, a combination a job, with the arguments that all share."""
    pbs.submit("submit_array.sh", "seed=0,1", "trust-region.initial-radius=0.5,1", "--", *SHORT, NAME="grid")
    arguments = pbs.arguments(1)
    assert arguments[arguments.index("-J") + 1] == "1-4"
    for number in range(1, 5):
        job = {"PBS_JOBID": f"1[{number}].server", "PBS_NODEFILE": str(pbs.path / "nodes")}
        done = pbs.start(1, PBS_ARRAY_INDEX=str(number), **job)
        assert done.returncode == 0, done.stderr
    runs = pbs.path / "runs" / "grid"
    names = {f"seed={seed},trust-region.initial-radius={radius}" for seed in (0, 1) for radius in ("0.5", "1")}
    assert {path.parent.name for path in runs.glob("*/summary.json")} == names
    assert len({summary(runs / name)["train_loss"] for name in names}) > 1


def test_pbs_stops_in_time_and_goes_on(pbs):
    """The run watches its wall time; its job submits the rest, of an array too, as a job of its own."""
    # One second, which no machine is fast enough for.
    long = ["--problem=digits", "--device=cpu", "--epochs=100000"]
    pbs.submit("submit_array.sh", "seed=0,1", "--", *long, NAME="long", WALLTIME="00:01:01")
    job = {"PBS_JOBID": "1[2].server", "PBS_NODEFILE": str(pbs.path / "nodes")}
    done = pbs.start(1, PBS_ARRAY_INDEX="2", **job)
    assert done.returncode == 75, done.stderr
    stopped = re.search(r"stopped after iteration (\d+), as the wall time is nearly over", done.stdout)
    assert stopped
    assert not (pbs.path / "runs" / "long" / "seed=1" / "summary.json").exists()
    arguments = pbs.arguments(2)
    assert "-J" not in arguments and "walltime=00:01:01" in arguments
    done = pbs.start(2, **job)
    assert done.returncode == 75, done.stderr
    assert f"resumed after iteration {stopped[1]} from" in done.stdout
    assert int(re.search(r"stopped after iteration (\d+)", done.stdout)[1]) > int(stopped[1])


def test_pbs_scaling_waits_for_all(pbs):
    assert pbs.submit("submit_scaling.sh", "strong", *SHORT, NAME="study", SIZES="1 4") == ["3.server"]
    assert "depend=afterany:1.server:2.server" in pbs.arguments(3)
    assert "select=1:ncpus=8:mpiprocs=1:ompthreads=8" in pbs.arguments(3)
    job = {"PBS_JOBID": "1.server", "PBS_NODEFILE": str(pbs.path / "nodes")}
    assert pbs.start(1, **job).returncode == 0
    done = pbs.start(3, **job)
    # The launcher of this site starts one rank; the run with four was not done at all.
    assert done.returncode == 1 and f"{pbs.path}/runs/study/ranks_4 has no summary.json" in done.stdout
    report = json.loads((pbs.path / "runs" / "study" / "scaling.json").read_text())
    assert [size["ranks"] for size in report["sizes"]] == [1]


def test_lsf_train(lsf):
    assert lsf.submit("submit_train.sh", NAME="first", RANKS="8", WALLTIME="02:00:00") == ["1"]
    assert lsf.arguments(1) == [
        "-J", "first", "-W", "120", "-wa", "USR1", "-wt", "1", "-n", "8",
        "-R", "span[ptile=4] affinity[core(8)]", "-o", f"{lsf.path}/runs/first/job-%J-%I.txt",
        "-P", "physics", "-q", "gpu", "-gpu", "num=4:mode=shared:j_exclusive=yes", "-r", "-Q", "75", "--extra",
    ]  # fmt: skip


def test_lsf_array(lsf):
    lsf.submit("submit_array.sh", "seed=0,1,2", "--", *SHORT, NAME="seeds")
    assert lsf.arguments(1)[:2] == ["-J", "seeds[1-3]"]
    done = lsf.start(1, LSB_JOBINDEX="3", LSB_JOBID="1", LSB_MCPU_HOSTS="one 1")
    assert done.returncode == 0, done.stderr
    assert summary(lsf.path / "runs" / "seeds" / "seed=2")["iterations"] == 2


def test_lsf_scaling_waits_for_all(lsf):
    assert lsf.submit("submit_scaling.sh", "weak", *SHORT, NAME="study", SIZES="1 4", SAMPLES_PER_RANK="50") == ["3"]
    arguments = lsf.arguments(3)
    assert arguments[arguments.index("-w") + 1] == "ended(1) && ended(2)"
    tasks = [(lsf.path / "runs" / "study" / f"ranks_{ranks}" / "tasks").read_text() for ranks in (1, 4)]
    assert [task.split()[0] for task in tasks] == ["--batch-size=50", "--batch-size=200"]


@pytest.fixture
def slurm(tmp_path):
    return Scheduler(tmp_path, "slurm", "sbatch", "$number")


@pytest.mark.parametrize("scheduler", ["pbs", "lsf", "slurm"])
def test_dry_run_prints_what_would_be_submitted_and_leaves_nothing(scheduler, request):
    scheduler = request.getfixturevalue(scheduler)
    done = scheduler.call("bash", JOBS / "submit_train.sh", *SHORT, NAME="first", RANKS="8", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert list(scheduler.kept.iterdir()) == [] and not (scheduler.path / "runs" / "first").exists()
    command, words = done.stdout.splitlines()[1:3]
    assert (
        words == "#!/usr/bin/env bash" and " OMP_NUM_THREADS=1 python -m apts_mpi.train --problem=digits" in done.stdout
    )
    scheduler.submit("submit_train.sh", *SHORT, NAME="first", RANKS="8")
    submitted = [argument.replace("\\", "") for argument in command.removesuffix("<<'END'").split()][2:]
    assert submitted == [word for argument in scheduler.arguments(1) for word in argument.split()]
    assert (scheduler.kept / "script_1").read_text() in done.stdout


def test_dry_run_of_a_study_shows_every_job(slurm):
    done = slurm.call("bash", JOBS / "submit_scaling.sh", "strong", *SHORT, NAME="s", SIZES="1 4", DRY_RUN="1")
    assert done.returncode == 0 and done.stdout.count("#!/usr/bin/env bash") == 3
    assert "--dependency=afterany:JOB:JOB" in done.stdout and list(slurm.kept.iterdir()) == []


@pytest.mark.parametrize(
    ("scheduler", "asked"),
    [
        ("pbs", "select=2:ncpus=32:mpiprocs=4:ompthreads=8:ngpus=4:mem=48gb"),
        ("lsf", "rusage[mem=48GB/host]"),
        ("slurm", "--mem=48G"),
    ],
)
def test_memory_is_asked_for(scheduler, asked, request):
    scheduler = request.getfixturevalue(scheduler)
    site = scheduler.path / "site.sh"
    site.write_text(site.read_text() + "gigabytes_per_rank=12\n")
    scheduler.submit("submit_train.sh", NAME="first", RANKS="8")
    assert asked in scheduler.arguments(1)
    site.write_text(site.read_text() + "gigabytes_per_rank=12G\n")
    done = scheduler.call("bash", JOBS / "submit_train.sh")
    assert done.returncode == 1 and done.stderr.startswith(
        "error: gigabytes_per_rank: '12G' is not a number of gigabytes"
    )


def test_ranks_are_bound_to_the_memory_next_to_their_gpu(slurm):
    """The job puts numactl between launcher and program: here one that says what it was called with."""
    site = slurm.path / "site.sh"
    site.write_text(site.read_text() + "numa_of_gpu=(3 1)\n")
    (slurm.path / "bin" / "numactl").write_text('#!/usr/bin/env bash\necho "$@"\n')
    (slurm.path / "bin" / "numactl").chmod(0o755)
    slurm.submit("submit_train.sh", *SHORT, NAME="first", RANKS="1")
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "one"}
    done = slurm.start(1, SLURM_LOCALID="1", **job)
    assert done.returncode == 0 and f"--cpunodebind=1 --membind=1 {sys.executable} -m apts_mpi.train" in done.stdout
    done = slurm.start(1, SLURM_LOCALID="2", **job)
    assert done.returncode == 1 and "numa_of_gpu: no NUMA domain is given for GPU 2" in done.stderr
    (slurm.path / "bin" / "numactl").unlink()
    done = slurm.start(1, SLURM_LOCALID="0", **job, PATH="/usr/bin:/bin")
    assert done.returncode == 1 and "numactl is not installed here" in done.stderr


def test_ranks_that_start_alone_are_named_with_the_launcher(slurm):
    """Two ranks by a launcher that starts one process, which is MPI's only one."""
    site = slurm.path / "site.sh"
    site.write_text(site.read_text().replace("-u APTS_MPI_RANKS ", ""))
    slurm.submit("submit_train.sh", *SHORT, NAME="alone", RANKS="2")
    done = slurm.start(1, SLURM_JOB_ID="1", SLURM_JOB_NODELIST="one")
    words = "the job has 2 ranks, but MPI has 1: 'env OMP_NUM_THREADS=1' does not start the ranks"
    assert done.returncode == 2 and done.stderr.startswith(f"apts_mpi.train: error: {words}"), done.stderr
    assert done.stderr.count("\n") == 1 and "choose_launcher of the site's file" in done.stderr


def test_the_doctor_is_started_as_the_ranks_of_a_run_are(slurm):
    site = slurm.path / "site.sh"
    site.write_text(
        site.read_text() + "choose_launcher() { launcher=(bash -c 'echo \"$APTS_MPI_RANKS $@\"' starts); }\n"
    )
    slurm.submit("submit_doctor.sh", NAME="doctor", RANKS="2")
    done = slurm.start(1, SLURM_JOB_ID="1", SLURM_JOB_NODELIST="one")
    directory = slurm.path / "runs" / "doctor"
    assert f"2 {sys.executable} -m apts_mpi.doctor --run-dir {directory}\n" in done.stdout, done.stderr


@pytest.mark.parametrize("site", sorted((JOBS / "sites").glob("*.sh")), ids=lambda path: path.stem)
def test_sample_sites(site, tmp_path):
    """Each describes whole nodes, and its job would be submitted to the scheduler that it names."""
    environment = outside_job() | {"SITE": str(site), "DRY_RUN": "1", "NAME": "first", "RANKS": "8"}
    done = subprocess.run(
        ["bash", JOBS / "submit_train.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "PROJECT" in done.stdout and "bind_to_gpu.sh python -m apts_mpi.train" in done.stdout
