"""What the doctor makes of what it finds."""

import dataclasses

import pytest

from apts_mpi.doctor.diagnosis import (
    Finding,
    RankFacts,
    judge_cores,
    judge_devices,
    judge_direct,
    judge_hdf5,
    judge_launcher,
    judge_locks,
    judge_overlap,
    judge_storage,
    judge_sums,
    judge_versions,
    worst,
)

MPICH, OPEN_MPI = "MPICH Version: 5.0.2", "Open MPI v4.1.4, package: Debian"
CRAY, INTEL = "MPI VERSION : CRAY MPICH version 8.1.29", "Intel(R) MPI Library 2021.13 for Linux* OS"
HYDRA, ORTE, PRTE = "HYDRA build details:", "mpirun (Open MPI) 4.1.4", "prterun (PRRTE) 3.0.2"


def rank(host="a", cores=(0, 1, 2, 3), threads=1, device="cpu", identity="", **versions):
    return RankFacts(host, tuple(cores), threads, device, identity, {"torch": "2.13.0"} | versions)


def test_the_worst_row_counts():
    rows = [Finding("a", "ok", ""), Finding("b", "fail", ""), Finding("c", "warn", "")]
    assert [worst(rows), worst(rows[::2]), worst(rows[:1])] == ["fail", "warn", "ok"]


@pytest.mark.parametrize(
    ("library", "said", "status"),
    [
        (MPICH, HYDRA, "ok"),
        (CRAY, HYDRA, "ok"),
        (INTEL, "Intel(R) MPI Library for Linux* OS", "ok"),
        (OPEN_MPI, ORTE, "ok"),
        (OPEN_MPI, PRTE, "ok"),
        (MPICH, ORTE, "fail"),
        (OPEN_MPI, HYDRA, "fail"),
        (MPICH, "1.0", "warn"),
        ("Another MPI", HYDRA, "warn"),
    ],
)
def test_launcher_in_path(library, said, status):
    row = judge_launcher("", library, "/bin/mpirun", said, 1)
    assert row.status == status and library in row.found and "/bin/mpirun" in row.found
    assert bool(row.remedy) == (status != "ok")


def test_no_launcher():
    assert judge_launcher("", MPICH, "", "", 1).status == "warn"
    assert judge_launcher("", MPICH, "", "", 2).status == "ok"  # started by something else, which works


def test_launcher_of_another_mpi():
    row = judge_launcher("started 2, MPI has 1; call another", MPICH, "/bin/mpirun", HYDRA, 1)
    assert (row.status, row.found, row.remedy) == ("fail", "started 2, MPI has 1", "call another")


def test_cores_suffice():
    ranks = [rank(cores=(0, 1), threads=2), rank(cores=(2, 3), threads=2), rank("b", threads=4)]
    row = judge_cores(ranks)
    assert row.status == "ok" and "ranks: 3, hosts: 2" in row.found and "cores: 2 to 4, threads: 2 to 4" in row.found
    assert row.values["hosts"] == {"a": 2, "b": 1}


def test_oversubscribed_by_threads():
    row = judge_cores([rank(threads=4), rank(threads=4)])
    assert row.status == "warn" and "2 ranks have 8 threads for 4 cores" in row.found
    assert row.remedy == "set OMP_NUM_THREADS=2"


def test_oversubscribed_by_ranks():
    row = judge_cores([rank("b"), *[rank()] * 5])
    assert "on a 5 ranks have 5 threads for 4 cores" in row.found
    assert "OMP_NUM_THREADS=1" in row.remedy and "4 ranks or fewer" in row.remedy


def test_oversubscribed_by_binding():
    """Two ranks bound to one core, while two other cores are free."""
    row = judge_cores([rank(cores=[0]), rank(cores=[0]), rank(cores=[1, 2, 3])])
    assert row.status == "warn" and "2 ranks have 2 threads for 1 cores" in row.found and "bind" in row.remedy


def test_devices():
    apart = [rank(device="cuda:0", identity="x"), rank(device="cuda:1", identity="y"), rank("b", identity="x")]
    assert judge_devices(apart).status == "ok" and "1 → a cuda:1" in judge_devices(apart).found
    row = judge_devices([*apart, rank(device="cuda:0", identity="y")])
    assert row.status == "warn" and "2 ranks share one GPU, such as 1 and 3 on a" in row.found
    assert "one rank a GPU" in row.remedy
    row = judge_devices([*apart, rank("c")])
    assert row.status == "fail" and "no GPU for rank 3" in row.found
    assert judge_devices([rank()] * 2).status == "ok" and "no GPU" in judge_devices([rank()]).found
    row = judge_devices([rank(), dataclasses.replace(rank("b"), has_driver=True)])
    assert row.status == "warn" and "though b has NVIDIA's driver" in row.found and "CUDA" in row.remedy


def test_sums():
    right, wrong = {"float32": 0, "float64": 0}, {"float32": 0, "float64": 7}
    rows = judge_sums([right, wrong, right])
    assert [row.status for row in rows] == ["ok", "fail"]
    assert "7 elements are wrong, first on rank 1" in rows[1].found and rows[1].values == {"wrong_ranks": [1]}


@pytest.mark.parametrize(
    ("outcome", "words", "works"),
    [(None, "no GPU", None), ("", "works;", True), ("killed by SIGSEGV", "does not work (killed by SIGSEGV)", False)],
)
def test_direct(outcome, words, works):
    row = judge_direct(outcome, "staging")
    assert words in row.found and "transport: staging" in row.found and row.values == {"works": works}


@pytest.mark.parametrize(
    ("library", "variable"),
    [
        (MPICH, "MPIR_CVAR_ASYNC_PROGRESS"),
        (CRAY, "MPICH_ASYNC_PROGRESS"),
        (INTEL, "I_MPI_ASYNC_PROGRESS"),
        (OPEN_MPI, None),
    ],
)
def test_overlap(library, variable):
    row = judge_overlap([(0.0, 0.3), (0.1, 0.2), (0.8, 0.4)], library, [])
    assert row.status == "warn" and row.values["variable"] == variable
    assert "0 to 80% of" in row.found and "20 to 40% with calls of Test" in row.found
    assert (row.values["plain"], row.values["plain_range"]) == (0.1, [0.0, 0.8])
    assert (row.values["tested"], row.values["tested_range"]) == (0.3, [0.2, 0.4])
    assert f"try {variable}=1" in row.remedy if variable else "no variable" in row.remedy
    assert judge_overlap([(0.2, 0.2), (0.9, 0.9), (0.9, 0.9)], library, []).status == "ok"
    if variable:
        assert "unset" in judge_overlap([(0.1, 0.3)], library, [variable]).remedy
    assert judge_overlap([], library, []).status == "ok"


def test_run_directory():
    assert judge_storage("runs", "", [], []).status == "ok"
    for arguments, words in [(("full", [], []), "full"), (("", [3], []), "rank 3"), (("", [], [2]), "rank 2 still")]:
        row = judge_storage("runs", *arguments)
        assert row.status == "fail" and words in row.found and "--run-dir" in row.remedy


def test_locks():
    assert judge_locks("", [], 2).status == "ok"
    assert judge_locks("not supported", [], 2).status == "warn"
    assert "rank 1 got" in judge_locks("", [1], 2).found


def test_hdf5():
    assert "one file that all ranks write" in judge_hdf5("h5py 3", True, "", 2).found
    assert "without MPI; checkpoints: a file a rank" in judge_hdf5("h5py 3", False, "", 2).found
    assert judge_hdf5("h5py 3", True, "no space", 2).status == "fail"


def test_versions():
    row = judge_versions([rank(), rank()], MPICH)
    assert row.status == "ok" and row.values["versions"] == {"torch": "2.13.0", "mpi": MPICH}
    row = judge_versions([rank(), rank("b", torch="2.4.0")], MPICH)
    assert row.status == "fail" and "rank 1 on b has torch 2.4.0, rank 0 on a 2.13.0" in row.found
