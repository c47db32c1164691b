"""``python -m apts_mpi.doctor`` and its tries on this machine."""

import functools
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mpi4py import MPI
from processes import LIMIT, command, find_mpirun, needs_mpirun, start, surroundings
from rich.console import Console

from apts_mpi.doctor import __main__ as doctor
from apts_mpi.doctor import probes
from apts_mpi.doctor.diagnosis import Finding
from apts_mpi.doctor.examination import show
from apts_mpi.parallel import gpu_direct as direct
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools import jobs
from apts_mpi.tools.events import Events

under_mpirun = functools.partial(start, ranks=2, module="apts_mpi.doctor")


@pytest.fixture
def alone(capsys, tmp_path, monkeypatch):
    """A function of arguments that calls the doctor in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            doctor.main(list(map(str, arguments)))
        output = capsys.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=output.out, stderr=output.err)

    return call


CHECKS = [
    "launcher",
    "cores",
    "GPUs",
    "allreduce float32",
    "allreduce float64",
    "Iallreduce on GPUs",
    "overlap",
    "shared memory",
    "run directory",
    "file locking",
    "h5py",
    "versions",
]


def rows_of(run):
    """Rows by the names of their checks, from the JSON that was printed; its form is seen to."""
    report = json.loads(run.stdout)
    assert report.keys() == {"status", "ranks", "checks"}
    for row in report["checks"]:
        assert row.keys() == {"check", "status", "found", "remedy", "values"}
        assert row["status"] in ("ok", "warn", "fail") and row["found"]
        assert row["status"] == "ok" or row["remedy"]
    statuses = [row["status"] for row in report["checks"]]
    assert report["status"] == next(status for status in ("fail", "warn", "ok") if status in statuses)
    assert run.returncode == (report["status"] == "fail")
    return {row["check"]: row for row in report["checks"]}


def check_report(run, ranks):
    """All is well here, but perhaps for cores, overlap and what other jobs left behind."""
    assert run.returncode == 0 and run.stderr == "", run.stderr
    rows = rows_of(run)
    assert list(rows) == CHECKS
    assert {row["check"] for row in rows.values() if row["status"] != "ok"} <= {"cores", "overlap", "shared memory"}
    assert len(rows["cores"]["values"]["cores"]) == json.loads(run.stdout)["ranks"] == ranks
    if not torch.cuda.is_available():
        assert "no GPU" in rows["GPUs"]["found"] and "no GPU" in rows["Iallreduce on GPUs"]["found"]
    assert rows["versions"]["values"]["versions"]["torch"] == torch.__version__
    return [rows["overlap"]["values"][name] for name in ("plain", "tested")]


@pytest.mark.processes
@needs_mpirun
def test_alone(alone, tmp_path):
    assert check_report(alone("--json", "--run-dir", "runs"), ranks=1) == [None, None]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
@needs_mpirun
def test_with_mpirun(tmp_path):
    shares = check_report(under_mpirun(tmp_path, arguments=["--json"]), ranks=2)
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
@needs_mpirun
def test_table_and_oversubscription(tmp_path):
    """Printed once; more threads than cores are named."""
    cores = len(os.sched_getaffinity(0))
    run = under_mpirun(tmp_path, arguments=[], OMP_NUM_THREADS=str(cores), COLUMNS="80")
    assert run.returncode == 0 and run.stderr == "", run.stderr
    printed = " ".join(run.stdout.split())
    assert printed.count("apts_mpi.doctor") == 1 + printed.count("python -m apts_mpi.doctor")
    for check in CHECKS:
        assert check in printed
    assert "oversubscribed" in printed and "OMP_NUM_THREADS=" in printed
    assert all(len(line) <= 80 for line in run.stdout.splitlines())


@pytest.mark.parametrize("width", [80, 119, 140])
def test_report_fits(width):
    """A table where there is room for one, else a list; what was found is no markup, and nothing is left out."""
    rows = [Finding("cores", "ok", "cores [0] " * 20), Finding("overlap", "warn", "none", "try this " * 30)]
    console = Console(file=io.StringIO(), width=width)
    show(rows, console)
    printed = console.file.getvalue()
    assert all(len(line) <= width for line in printed.splitlines()) and "…" not in printed
    assert (printed.count("[0]"), printed.count("try"), printed.count("this")) == (20, 30, 30)
    assert ("│" in printed) == (width == 140) and ("→ try this" in printed) == (width < 140)


@pytest.mark.processes
@pytest.mark.parametrize("number", [0, 1])
def test_launcher_of_another_mpi(alone, monkeypatch, number):
    """It says that there are two processes, while the library knows one: the first of them tells."""
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", str(number))
    run = alone("--json")
    assert run.returncode == 1
    if number == 1:
        assert run.stdout == ""
    else:
        row = rows_of(run)["launcher"]
        assert row["status"] == "fail" and "the launcher started 2 processes, but MPI has 1" in row["found"]
        assert "MPI4PY_MPIABI" in row["remedy"]


@pytest.mark.processes
def test_no_launcher(alone, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert rows_of(alone("--json"))["launcher"]["status"] == "warn"


def test_bad_option(alone):
    run = alone("--nonsense")
    assert run.returncode == 2 and run.stdout == "" and "unrecognized arguments: --nonsense" in run.stderr


@pytest.mark.mpi(min_size=2)
@pytest.mark.usefixtures("few_ranks")
def test_bad_option_is_told_once(world, capfd):
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--nonsense"])
    output, errors = capfd.readouterr()
    assert ended.value.code == 2 and output == ""
    assert errors.count("unrecognized arguments: --nonsense") == (world.rank == 0)


@pytest.mark.processes
def test_run_directory_is_a_file(alone, tmp_path):
    (tmp_path / "runs").write_text("")
    rows = rows_of(alone("--json"))
    assert rows["run directory"]["status"] == rows["h5py"]["status"] == "fail"
    assert "Not a directory" in rows["run directory"]["found"] and "file locking" not in rows


@pytest.fixture
def disk(tmp_path):
    """A directory on a file system of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


@pytest.mark.processes
@needs_mpirun
def test_read_only_run_directory(tmp_path, disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    run = under_mpirun(tmp_path, arguments=["--json", "--run-dir", str(disk / "new" / "runs")])
    assert run.stderr == ""
    row = rows_of(run)["run directory"]
    assert row["status"] == "fail" and f"{disk}: Read-only file system" in row["found"]


@pytest.mark.processes
def test_full_run_directory(alone, disk):
    (disk / "ballast").write_bytes(bytes(4 * 2**20 - 2**14))
    rows = rows_of(alone("--json", "--run-dir", disk))
    assert rows["run directory"]["status"] == "ok" and rows["h5py"]["status"] == "fail"
    assert "No space left" in rows["h5py"]["found"]
    assert [path.name for path in disk.iterdir()] == ["ballast"]


@pytest.mark.processes
@needs_mpirun
def test_run_directory_that_ranks_do_not_share(tmp_path, disk):
    """Rank 1 has another file system at the same place, as on a host of its own."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    line = command(2, ["--json", "--run-dir", str(disk)], "apts_mpi.doctor")
    program = line[3:]
    hidden = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(disk)]
    run = subprocess.run(
        [find_mpirun(), "-n", "1", *program, ":", "-n", "1", *hidden, *program],
        cwd=tmp_path,
        env=surroundings(tmp_path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    row = rows_of(run)["run directory"]
    assert row["status"] == "fail" and "rank 1 sees other files than rank 0" in row["found"]
    assert list(disk.iterdir()) == []


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_sums(world):
    wrong = probes.sum_everywhere(Communicator(world, Events()), torch.device("cpu"))
    assert wrong == [{"float32": 0, "float64": 0}] * world.size


class Faulty(Communicator):
    """Adds wrongly in one element on the last rank."""

    def sum(self, mirror):
        super().sum(mirror)
        mirror.tensor[3] += float(self.rank == self.size - 1)


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_wrong_sums(world):
    wrong = probes.sum_everywhere(Faulty(world, Events()), torch.device("cpu"))
    assert wrong[-1] == {"float32": 2, "float64": 2}
    assert all(sum(counts.values()) == 0 for counts in wrong[:-1])


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
def test_a_lock_is_seen_by_the_others(world, mpi_tmp_path):
    """Without a file system that ignores locks at hand: a lock that rank 0 gave back is had by all others in turn."""
    comm = Communicator(world, Events())
    assert probes.try_locks(comm, mpi_tmp_path) == ("", [])
    world.Barrier()  # rank 0 lets go after the others have told
    if world.rank == 1:
        assert probes._can_lock(mpi_tmp_path / "lock")
    world.Barrier()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("pass", ""),
        ("raise SystemExit(3)", "exit status 3"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import time; time.sleep(60)", "no end after 1 s"),
    ],
)
def test_process_that_may_crash(code, failure):
    assert jobs.run_apart([sys.executable, "-c", code], 1.0 if "sleep" in code else LIMIT)[0] == failure


@pytest.mark.processes
def test_process_that_hangs_leaves_none_behind(tmp_path):
    """As a launcher and its ranks do."""
    child = tmp_path / "child"
    code = (
        f"import subprocess; print(subprocess.Popen(['sleep', '60']).pid, file=open({str(child)!r}, 'w'), flush=True)"
    )
    jobs.run_apart([sys.executable, "-c", code + "; import time; time.sleep(60)"], 5.0)
    state = Path(f"/proc/{child.read_text().strip()}/stat")
    assert not state.exists() or state.read_text().split(")")[-1].split()[0] == "Z"


@pytest.mark.processes
@needs_mpirun
def test_direct_sums_in_processes_of_their_own(tmp_path):
    """On CPU tensors, which every library sums; a device that is not there is no crash of the doctor."""
    run = start(tmp_path, 2, ["cpu"], module="apts_mpi.parallel.gpu_probe")
    assert run.returncode == 0, run.stderr
    comm = Communicator(MPI.COMM_SELF, Events())
    if not torch.cuda.is_available():
        assert direct.try_direct(comm, "cuda").startswith("exit status")
