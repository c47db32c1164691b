"""What killed jobs leave in shared memory: found and removed, but nothing that a process uses."""

import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import LIMIT, TESTS, descendants, find_mpirun, needs_mpirun, surroundings

from apts_mpi.doctor.shared_memory import (
    MANY,
    NOTABLE_SHARE,
    PROCESSES,
    SHARED_MEMORY,
    YOUNG,
    Segment,
    Survey,
    _used_files,
    describe_shortage,
    is_short,
    judge_shared_memory,
    remove,
    survey,
)
from apts_mpi.tools import environment

NAMES = [
    "mpich_shm_1a2b_0",
    "open_mpi.0000",
    "psm3_shm.996.0x8003b4103:fe80000000000000:98039b03000c56de.0",
    "sm_segment.host.1000.5af10001.0",
    "vader_segment.vm.0.13c40001.1",
]
SIZE = 2**16

SLEEPER = """
import time
from mpi4py import MPI
MPI.COMM_WORLD.barrier()
print("ready", flush=True)
time.sleep(60)
"""


def make(directory, name, age=2 * YOUNG):
    """A segment that was made some seconds ago."""
    path = directory / name
    path.write_bytes(bytes(SIZE))
    make_older(path, age)
    return path


def make_older(path, age=2 * YOUNG):
    made = environment.wall_time() - age
    os.utime(path, (made, made))


def names_of(segments):
    return [segment.name for segment in segments]


@pytest.fixture
def left(tmp_path):
    """A directory with segments that nobody uses, and no others."""
    for name in NAMES:
        make(tmp_path, name)
    return tmp_path


def test_unused_segments_are_found_and_removed(left):
    found = survey(left)
    assert names_of(found.unused) == NAMES and found.bytes == len(NAMES) * SIZE
    assert not found.obstacle and found.capacity > 0
    removed, failures = remove(NAMES, left)
    assert names_of(removed) == NAMES and failures == {} and list(left.iterdir()) == []
    assert remove(NAMES, left) == ([], {})


@pytest.mark.parametrize(
    "name", ["notes.txt", "my_mpich_shm_1_0", "sem.lock", "psm_1234", "mpich_shm_\n", "mpich_shm_ü"]
)
def test_other_files_are_left_alone(tmp_path, name):
    make(tmp_path, name)
    assert survey(tmp_path).unused == ()


def test_young_segments_are_left_alone(tmp_path):
    for number, age in enumerate([0.0, YOUNG - 10.0, -3600.0]):
        make(tmp_path, f"mpich_shm_{number}_0", age)
    assert survey(tmp_path).unused == ()
    assert remove([path.name for path in tmp_path.iterdir()], tmp_path) == ([], {})
    assert len(list(tmp_path.iterdir())) == 3


def test_links_directories_and_pipes_are_left_alone(tmp_path):
    target = make(tmp_path, "precious")
    (tmp_path / "mpich_shm_1_0").symlink_to(target)
    (tmp_path / "mpich_shm_2_0").mkdir()
    os.mkfifo(tmp_path / "mpich_shm_3_0")
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0), follow_symlinks=False)
    assert survey(tmp_path).unused == ()
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to give a file away")
def test_segments_of_others_are_left_alone(left):
    os.chown(left / NAMES[1], 12345, -1)
    assert names_of(survey(left).unused) == NAMES[:1] + NAMES[2:]
    assert names_of(remove(NAMES, left)[0]) == NAMES[:1] + NAMES[2:]
    assert [path.name for path in left.iterdir()] == [NAMES[1]]


@contextmanager
def opened(path, mode):
    with open(path, mode):
        yield


@contextmanager
def mapped(path, mode):
    """Mapped, and its file closed again, as MPI libraries do."""
    access = mmap.ACCESS_READ if mode == "rb" else mmap.ACCESS_WRITE
    with open(path, mode) as file:
        memory = mmap.mmap(file.fileno(), 0, access=access)
    with memory:
        yield


@pytest.mark.parametrize("mode", ["rb", "r+b"])
@pytest.mark.parametrize("use", [opened, mapped])
@pytest.mark.parametrize("sees", [True, False], ids=["seen", "as from another container"])
def test_used_segments_are_left_alone(left, tmp_path_factory, use, mode, sees):
    """By what the system tells of processes, and where it does not tell of the one that matters."""
    processes = PROCESSES
    if not sees:
        processes = tmp_path_factory.mktemp("proc")
        (processes / "self").mkdir()
        (processes / "self" / "maps").write_text("")
    with use(left / NAMES[0], mode):
        assert names_of(survey(left, processes).unused) == NAMES[1:]
        assert names_of(remove(NAMES, left, processes)[0]) == NAMES[1:]
    assert [path.name for path in left.iterdir()] == [NAMES[0]]
    assert names_of(survey(left, processes).unused) == NAMES[:1]


@pytest.mark.parametrize("use", [opened, mapped])
def test_the_system_tells_of_processes(left, use):
    """By itself, without the lease."""
    assert _used_files(left, PROCESSES) == set()
    with use(left / NAMES[0], "r+b"):
        assert _used_files(left, PROCESSES) == {NAMES[0]}


def test_a_directory_by_another_name(left, tmp_path_factory):
    """As where /dev/shm is a link to /run/shm."""
    link = tmp_path_factory.mktemp("links") / "shm"
    link.symlink_to(left)
    with mapped(left / NAMES[0], "r+b"):
        assert _used_files(link, PROCESSES) == {NAMES[0]}
        assert names_of(survey(link).unused) == NAMES[1:]


@pytest.mark.processes
def test_processes_that_cannot_be_seen(left):
    """In a container with processes of its own that shares the memory of the host."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    code = (
        "import sys; from pathlib import Path; from apts_mpi.doctor.shared_memory import remove, survey; "
        "place = Path(sys.argv[1]); names = [segment.name for segment in survey(place).unused]; "
        "print(names, [segment.name for segment in remove(sys.argv[2:], place)[0]])"
    )
    inside = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code, str(left), *NAMES]
    with mapped(left / NAMES[0], "r+b"):
        run = subprocess.run(inside, env=surroundings(left), capture_output=True, text=True, timeout=LIMIT)
    if "Operation not permitted" in run.stderr:
        pytest.skip("needs the right to make a namespace of processes")
    assert run.stdout == f"{NAMES[1:]} {NAMES[1:]}\n", run.stderr
    assert [path.name for path in left.iterdir()] == [NAMES[0]]


@pytest.mark.parametrize("missing", ["directory", "processes"])
def test_systems_without_shared_memory_or_processes(left, missing):
    found = survey(**({"directory": left} | {missing: left / "missing"}))
    assert found.unused == () and str(left / "missing") in found.obstacle
    row = judge_shared_memory([found])
    assert row.status == "ok" and found.obstacle in row.found
    if missing == "processes":
        with pytest.raises(FileNotFoundError):
            remove(NAMES, left, left / "missing")
        assert len(list(left.iterdir())) == len(NAMES)


@pytest.mark.parametrize(
    ("number", "size", "capacity", "status"),
    [
        (0, 0, 10**9, "ok"),
        (1, 10**6, 10**9, "ok"),
        (1, int(NOTABLE_SHARE * 10**9), 10**9, "warn"),
        (1, 3 * 10**6, 64 * 10**6, "ok"),
        (2, 3 * 10**6, 64 * 10**6, "warn"),
        (MANY - 1, 1, 10**9, "ok"),
        (MANY, 0, 10**9, "warn"),
        (1, 10**9, 0, "ok"),
    ],
)
def test_judgement(number, size, capacity, status):
    segments = tuple(Segment(f"mpich_shm_{count}_0", size) for count in range(number))
    row = judge_shared_memory([Survey("a", (), capacity), Survey("b", segments, capacity)])
    assert row.status == status, row
    assert ("--clear-shared-memory" in row.remedy) == (status == "warn")
    assert row.found.startswith(f"b: {number} segment") if number else "no segments" in row.found
    assert [(host["host"], host["bytes"]) for host in row.values["hosts"]] == [("a", 0), ("b", number * size)]
    json.dumps(row.values)


def test_shortage_in_words():
    assert "see what fills it" in describe_shortage(Survey("a", (), 10**9, 10**6))
    words = describe_shortage(Survey("a", (Segment("mpich_shm_1_0", 10**8),), 10**9, 10**6))
    assert "1.0 MB left of 1.0 GB" in words and "1, 100.0 MB; python -m apts_mpi.doctor --clear-shared-memory" in words


def test_where_there_is_room(tmp_path):
    assert not is_short(1, tmp_path) and not is_short(1, tmp_path / "missing")
    assert is_short(2**40, tmp_path)


def rank_processes(job):
    return [number for number in descendants(job.pid) if not descendants(number)]


def segments_of(numbers):
    """Names of the segments that processes have mapped, those that are there still."""
    lines = [line for number in numbers for line in Path(f"/proc/{number}/maps").read_text().splitlines()]
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if f"{SHARED_MEMORY}/" in line and "deleted" not in line}
    return sorted(path.name for path in paths)


@contextmanager
def sleeping_job(directory):
    """A job of two ranks under way, killed at the end as a whole."""
    with subprocess.Popen(
        [find_mpirun(), "-n", "2", sys.executable, "-c", SLEEPER],
        cwd=directory,
        env=surroundings(directory),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as job:
        try:
            # Lines of several ranks may meet.
            said = ""
            while said.count("ready") < 2:
                said += job.stdout.readline()
                assert job.poll() is None, said
            yield job
        finally:
            kill_whole(job)


def kill_whole(job):
    """The launcher first, so that it cannot clear up; then its proxy and the ranks."""
    numbers = [job.pid, *descendants(job.pid)]
    for number in numbers:
        os.kill(number, signal.SIGSTOP)
    for number in numbers:
        os.kill(number, signal.SIGKILL)
    deadline = time.monotonic() + LIMIT
    while any(has_memory(number) for number in numbers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_memory(number):
    """Whether a process is there and no zombie, which has closed all its files."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


@pytest.mark.processes
@needs_mpirun
@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="needs /dev/shm")
def test_a_job_under_way_and_then_killed(tmp_path):
    """Only what this job made is removed here, whatever else there is on this machine."""
    with sleeping_job(tmp_path) as job:
        own = segments_of(rank_processes(job))
        assert own
        for name in own:
            make_older(SHARED_MEMORY / name)
        assert not set(own) & set(names_of(survey().unused))
        assert remove(own) == ([], {})
        assert segments_of(rank_processes(job)) == own and job.poll() is None
    for name in own:
        make_older(SHARED_MEMORY / name)
    found = survey()
    assert set(own) <= set(names_of(found.unused))
    assert names_of(remove(own)[0]) == own
    assert not any((SHARED_MEMORY / name).exists() for name in own)
    assert not set(own) & set(names_of(survey().unused))


# In a namespace with a /dev/shm of its own: the arguments are its size and a Python program.
INSIDE = 'mount -t tmpfs -o size="$0" tmpfs /dev/shm && exec "$@"'


@pytest.fixture
def with_own_memory(tmp_path):
    """A function that runs a Python program where /dev/shm is empty and of some size; its output."""

    def run(size, code):
        (tmp_path / "program.py").write_text(code)
        line = ["unshare", "--mount", "sh", "-c", INSIDE, size, sys.executable, str(tmp_path / "program.py")]
        return subprocess.run(
            line, cwd=tmp_path, env=surroundings(tmp_path), capture_output=True, text=True, timeout=LIMIT
        )

    if shutil.which("unshare") is None or run("4m", "").returncode:
        pytest.skip("needs the right to mount a file system")
    return run


COMMANDS = f"""
import json, os, subprocess, sys
sys.path.insert(0, {str(TESTS / "doctor")!r})
from pathlib import Path
from test_shared_memory import make, mapped, sleeping_job
doctor = [sys.executable, "-m", "apts_mpi.doctor"]
shm = Path("/dev/shm")
def say(*arguments, launcher=()):
    run = subprocess.run([*launcher, *doctor, *arguments], capture_output=True, text=True)
    assert not run.stderr, run.stderr
    return run
"""


@pytest.mark.processes
@pytest.mark.slow
@needs_mpirun
def test_commands_where_there_is_no_room(with_own_memory):
    """Killed jobs have filled the memory, so that MPI cannot start; then it can, and a used segment is there still."""
    run = with_own_memory(
        "40m",
        COMMANDS
        + f"""
paths = [shm / f"mpich_shm_{{number}}_0" for number in range(3)] + [shm / "vader_segment.vm.0.1.0"]
def there():
    return [path.name for path in paths if path.exists()]
for path in paths[:3]:
    path.write_bytes(bytes(13 * 2**20))
    os.utime(path, (0, 0))
with mapped(make(shm, paths[3].name), "r+b"):
    (shm / "ballast").write_bytes(bytes(2**20 - {SIZE} - 2**14))
    for launcher in ((), ({find_mpirun()!r}, "-n", "2")):
        full = subprocess.run([*launcher, *doctor], capture_output=True, text=True)
        words = "MPI may not start; segments of jobs that ended: 3, 40.9 MB; python -m apts_mpi.doctor --clear-shared-"
        print(full.returncode != 0, full.stderr.count(words))
    first = say("--clear-shared-memory", launcher=[{find_mpirun()!r}, "-n", "2"])
    print(first.returncode, first.stdout.count("removed /dev/shm/mpich_shm_"), there())
    print(first.stdout.count("3 removed"), first.stdout.count("segments of jobs"))
    rows = {{row["check"]: row for row in json.loads(say("--json").stdout)["checks"]}}
    print(rows["shared memory"]["status"], rows["shared memory"]["values"]["hosts"][0]["unused"])
second = json.loads(say("--clear-shared-memory", "--json").stdout)
print(second["removed"], second["failures"], second["obstacle"] == "", there())
print(say("--clear-shared-memory").stdout.endswith("segments of jobs that ended: 0 removed, 0.0 MB\\n"))
""",
    )
    assert run.stdout.splitlines() == [
        "True 1",
        "True 1",
        "0 3 ['vader_segment.vm.0.1.0']",
        "1 1",
        "ok []",
        f"[{{'name': 'vader_segment.vm.0.1.0', 'bytes': {SIZE}}}] {{}} True []",
        "True",
    ], run.stderr


@pytest.mark.processes
@pytest.mark.slow
@needs_mpirun
def test_a_killed_job_is_reported(with_own_memory):
    """In the table and as data, once a host, with a warning where it takes a notable part."""
    run = with_own_memory(
        "36m",
        COMMANDS
        + f"""
with sleeping_job(Path()):
    pass
for path in shm.iterdir():
    os.utime(path, (0, 0))
left = sorted(os.listdir(shm))
report = json.loads(say("--json", launcher=[{find_mpirun()!r}, "-n", "2"]).stdout)
row = {{row["check"]: row for row in report["checks"]}}["shared memory"]
print(row["status"], report["ranks"], len(row["values"]["hosts"]))
print(left != [] and left == [segment["name"] for segment in row["values"]["hosts"][0]["unused"]])
table = say().stdout
print("of jobs that ended" in table, "--clear-shared-memory" in table)
cleared = say("--clear-shared-memory")
print(all(f"removed /dev/shm/{{name}}, " in cleared.stdout for name in left), os.listdir(shm))
""",
    )
    assert run.stdout.splitlines() == ["warn 2 1", "True", "True True", "True []"], run.stderr


@pytest.mark.processes
def test_what_cannot_be_removed_is_told(with_own_memory):
    run = with_own_memory(
        "4m",
        COMMANDS
        + """
make(shm, "mpich_shm_1_0")
subprocess.run(["mount", "-o", "remount,ro", shm], check=True)
cleared = say("--clear-shared-memory")
print(cleared.returncode, "cannot remove /dev/shm/mpich_shm_1_0: Read-only file system" in cleared.stdout)
print(json.loads(say("--clear-shared-memory", "--json").stdout)["failures"], os.listdir(shm))
""",
    )
    failure = "{'mpich_shm_1_0': 'Read-only file system'} ['mpich_shm_1_0']"
    assert run.stdout.splitlines() == ["1 True", failure], run.stderr


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"MPI_LOCALRANKID": "0"}, True),
        ({"MPI_LOCALRANKID": "1"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "3"}, False),
        ({"MPI_LOCALRANKID": "1", "SLURM_LOCALID": "0"}, False),
    ],
)
def test_one_process_of_a_host(monkeypatch, variables, first):
    for name in environment.LOCAL_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.is_first_on_host() == first
