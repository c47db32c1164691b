"""A file of records that loses its disk, its room or its place."""

import os
import resource
import shutil
from contextlib import contextmanager

import pytest

from apts_mpi.records.directory import RunDirectory, make_new_directory
from apts_mpi.records.lasting import BLOCK, PAUSE, LastingFile
from apts_mpi.tools.environment import pause


@pytest.fixture
def told():
    return []


@pytest.fixture
def records(tmp_path, told):
    """A file in a directory of its own, with one record."""
    file = LastingFile(tmp_path / "run" / "history.jsonl", told.append)
    file.write(b"first\n")
    assert file.flush()
    yield file
    file.close()


@contextmanager
def no_file_larger(size):
    """As with a quota."""
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, earlier[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)


def text(tmp_path):
    return (tmp_path / "run" / "history.jsonl").read_bytes()


def test_what_has_no_room_waits_whole_and_is_written_once(tmp_path, records, told):
    """The file takes a part of a record: that part must not stay."""
    lines = [b"x" * 100 + b" %d\n" % number for number in range(500)]
    with no_file_larger(30_000):
        for line in lines:
            records.write(line)
        assert not records.flush()
        assert text(tmp_path).endswith(b"\n") and len(text(tmp_path)) > 30_000 - 2 * BLOCK
        assert records.contents() == b"first\n" + b"".join(lines)
        pause(PAUSE)
        assert not records.flush()
    pause(PAUSE)
    assert records.flush()
    assert text(tmp_path) == records.contents() == b"first\n" + b"".join(lines)
    assert [message.split()[0] for message in told] == ["warning:", "note:"]
    assert "File too large" in told[0]


def test_what_still_has_no_room_at_the_end_is_told(tmp_path, records, told):
    with no_file_larger(10):
        records.write(b"second\n")
        records.close()
    assert text(tmp_path) == b"first\n"
    assert "lacks its last 1 records (File too large)" in told[-1]


@pytest.mark.parametrize("take_away", [shutil.rmtree, lambda run: run.rename(run.with_name("elsewhere"))])
def test_file_that_is_gone_is_made_again(tmp_path, records, told, take_away):
    take_away(tmp_path / "run")
    records.write(b"second\n")
    assert records.flush() and text(tmp_path) == b"first\nsecond\n"
    assert len(told) == 1 and "has been written anew" in told[0]


def test_copy_of_the_file_is_replaced_and_what_is_somebody_elses_is_not(tmp_path, records, told):
    """A directory may be moved to another disk, with a link in its place."""
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "copy")
    (tmp_path / "run").symlink_to("copy")
    records.write(b"second\n")
    assert records.flush() and text(tmp_path) == b"first\nsecond\n"
    (tmp_path / "copy" / "history.jsonl").unlink()
    (tmp_path / "copy" / "history.jsonl").write_bytes(b"theirs\nand more\n")
    records.write(b"third\n")
    assert not records.flush() and text(tmp_path) == b"theirs\nand more\n"
    assert "something else is in its place" in told[-1]
    assert records.contents() == b"first\nsecond\nthird\n"


def put_pipe(run):
    shutil.rmtree(run)
    run.mkdir()
    os.mkfifo(run / "history.jsonl")


def put_file(run):
    shutil.rmtree(run)
    run.write_text("")


def put_dead_link(run):
    shutil.rmtree(run)
    run.symlink_to("nowhere")


@pytest.mark.parametrize("put", [put_pipe, put_file, put_dead_link])
def test_what_is_in_the_way_is_told_and_not_waited_for(tmp_path, records, told, put):
    put(tmp_path / "run")
    records.write(b"second\n")
    assert not records.flush() and records.contents() == b"first\nsecond\n"
    assert len(told) == 1 and "cannot be written" in told[0]


def test_file_that_something_else_cuts_or_lengthens(tmp_path, records, told):
    """Records stay whole lines; what is lost is told."""
    records.write(b"second\n")
    records.flush()
    os.truncate(tmp_path / "run" / "history.jsonl", 9)
    records.write(b"third\n")
    assert records.flush() and text(tmp_path) == b"first\nthird\n"
    assert len(told) == 1 and "cut short by something else" in told[0]
    with (tmp_path / "run" / "history.jsonl").open("ab") as file:
        file.write(b'{"half')
    records.write(b"fourth\n")
    assert records.flush() and text(tmp_path) == b"first\nthird\nfourth\n"


def test_summary_goes_into_no_other_directory(tmp_path, told):
    directory = RunDirectory(tmp_path / "run", "seed: 3\n", told.append, overwrite=False)
    directory.record({"iteration": 1})
    directory.flush()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "history.jsonl").write_text("theirs\n")
    directory.close()
    assert "summary.json' cannot be written" in directory.write_summary({})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["history.jsonl"]


def test_configuration_comes_back_with_the_records(tmp_path, told):
    with RunDirectory(tmp_path / "run", "seed: 3\n", told.append, overwrite=False) as directory:
        shutil.rmtree(tmp_path / "run")
        directory.record({"iteration": 1})
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 3\n"
    assert text(tmp_path) == b'{"iteration": 1}\n'
    assert directory.write_summary({}) == ""


def test_new_directories_are_distinct(tmp_path):
    made = [make_new_directory(tmp_path / "runs" / "digits-1.5").name for _ in range(3)]
    assert made == ["digits-1.5", "digits-1.5-2", "digits-1.5-3"]
