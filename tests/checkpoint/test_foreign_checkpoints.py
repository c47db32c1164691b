"""A checkpoint of somebody else: whatever is in it, with right checksums, is looked at before it is used."""

import os
import re
import struct
import time
import zlib

import h5py
import numpy as np
import pytest
import torch
from foreign_files import INDEX, METADATA, as_hdf5, change_index, change_metadata, change_part, put, resealed, set_text
from thread_ranks import on_ranks

from apts_mpi.checkpoint import Checkpoint, CheckpointDirectory, __main__, seals, split_evenly
from apts_mpi.checkpoint.directory import is_used
from apts_mpi.errors import InvalidInput

NAME = "parameters/0.weight"


def save(path, ranks=1, arrays=None):
    values = {NAME: np.arange(12.0).reshape(6, 2), "parameters/1.bias": np.arange(6.0), "buffers/2.mean": np.array(1.0)}

    def run(comm):
        with CheckpointDirectory(path, comm, writer="parts") as checkpoints:
            return checkpoints.save(split_evenly(arrays or values, comm), {"step": 1}, 1)

    return on_ranks(ranks, run)[0]


@pytest.fixture
def whole(tmp_path):
    """A checkpoint in one file."""
    return save(tmp_path)


@pytest.fixture
def parted(tmp_path):
    """A checkpoint with the parts of two ranks."""
    return save(tmp_path, 2)


@pytest.fixture
def command(capsys):
    """Call the command; gives status, output and errors."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            __main__.main([str(argument) for argument in arguments])
        return end.value.code, *capsys.readouterr()

    return call


def assert_refused(path, words, command):
    """By every reader, in one line."""
    with pytest.raises(InvalidInput, match=words) as caught, Checkpoint(path):
        pass
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    for name, more in (("info", []), ("to-torch", [path.parent / "out.pt"]), ("diff", [path])):
        status, output, errors = command(name, path, *more)
        assert (status, output, errors.count("\n")) == (2, "", 1), errors
        assert re.search(words, errors)
    status, output, errors = command("verify", path)
    assert (status, output.count("\n"), errors) == (1, 1, "") and re.search(words, output)
    assert not (path.parent / "out.pt").exists()


# The index and the metadata

WRONG_INDEX = {
    "no object": (lambda index: [], r"index: \[\] is not allowed"),
    "no step": (lambda index: put(index, ["step"], ...), "index: 'step' is missing"),
    "negative step": (lambda index: put(index, ["step"], -1), "step: -1 is not allowed"),
    "step true": (lambda index: put(index, ["step"], True), "step: True is not allowed"),
    "step of a thousand digits": (lambda index: put(index, ["step"], 10**1000), r"step: 1000+\.\.\.0+ is not allowed"),
    "another key": (lambda index: put(index, ["more"], 1), "'more' is not known"),
    "arrays no list": (lambda index: put(index, ["arrays"], {}), "arrays: {} is not allowed"),
    "array no object": (lambda index: put(index, ["arrays", 0], NAME), r"arrays\[0\]: 'parameters/0.weight' is not"),
    "array without dtype": (lambda index: put(index, ["arrays", 0, "dtype"], ...), r"arrays\[0\]: 'dtype' is missing"),
    "name no text": (lambda index: put(index, ["arrays", 0, "name"], [1]), r"name: \[1\] is not allowed"),
    "name leads upwards": (lambda index: put(index, ["arrays", 0, "name"], "a/../b"), "'a/../b' cannot be used"),
    "name twice": (lambda index: put(index, ["arrays", 1, "name"], NAME), "cannot be used"),
    "name of the index": (lambda index: put(index, ["arrays", 0, "name"], INDEX), "cannot be used"),
    "name of two lines": (lambda index: put(index, ["arrays", 0, "name"], "a\nb"), r"'a\\nb' cannot be used"),
    "name with half a sign": (lambda index: put(index, ["arrays", 0, "name"], "\ud800"), "cannot be used"),
    "long name": (
        lambda index: put(index, ["arrays", 0, "name"], "a/../" * 10**6),
        r"'a/../a/../.*\.\.\..* cannot be used",
    ),
    "another name": (lambda index: put(index, ["arrays", 0, "name"], "parameters/x"), "parameters/x is missing"),
    "one array less": (lambda index: put(index, ["arrays", 0], ...), "group 'parameters' has 2 members, not 1"),
    "another shape": (lambda index: put(index, ["arrays", 0, "shape"], [2, 6]), r"has shape and type \(\(6, 2\)"),
    "negative shape": (lambda index: put(index, ["arrays", 0, "shape"], [-6, -2]), r"shape\[0\]: -6 is not allowed"),
    "shape no list": (lambda index: put(index, ["arrays", 0, "shape"], 12), "shape: 12 is not allowed"),
    "shape of texts": (lambda index: put(index, ["arrays", 0, "shape"], ["6", 2]), r"shape\[0\]: '6' is not allowed"),
    "huge shape": (lambda index: put(index, ["arrays", 0, "shape"], [2**61, 2**61]), "that of at most"),
    "many dimensions": (lambda index: put(index, ["arrays", 0, "shape"], [1] * 99), "a list of at most 32"),
    "another dtype": (lambda index: put(index, ["arrays", 0, "dtype"], "<i8"), "has shape and type"),
    "objects": (lambda index: put(index, ["arrays", 0, "dtype"], "|O"), r"dtype: '\|O' is not allowed"),
    "texts": (lambda index: put(index, ["arrays", 0, "dtype"], "<U4"), "dtype: '<U4' is not allowed"),
    "records": (lambda index: put(index, ["arrays", 0, "dtype"], "f4,f4"), "dtype: 'f4,f4' is not allowed"),
    "no such dtype": (lambda index: put(index, ["arrays", 0, "dtype"], "<f5"), "dtype: '<f5' is not allowed"),
    "parts without checksums": (lambda index: put(index, ["parts"], "step-00000001.parts"), r"checksums: \[\] is not"),
    "checksums without parts": (lambda index: put(index, ["checksums"], [1]), r"checksums: \[1\] is not allowed"),
    "deep": (lambda index: put(index, ["arrays"], deep(100)), "more than 64 times"),
    "no JSON": (lambda index: b"{", "index: this is no JSON text"),
    "no text": (lambda index: b"\xff\xfe", "is no text"),
    "nothing": (lambda index: b"", "this is no JSON text"),
    "too deep to be read": (lambda index: b"[" * 10**5, "this is no JSON text"),
}


def deep(count):
    found = []
    for _ in range(count):
        found = [found]
    return found


@pytest.mark.parametrize("fault", WRONG_INDEX)
def test_index_that_is_none(whole, command, fault):
    change, words = WRONG_INDEX[fault]
    change_index(whole, change)
    assert_refused(whole, words, command)


WRONG_METADATA = {
    "a list": (lambda metadata: [1], r"metadata: \[1\] is not allowed"),
    "no JSON": (lambda metadata: b"\x00", "metadata: this is no JSON text"),
    "too deep": (lambda metadata: {"a": deep(500)}, "more than 64 times"),
    "a number of many digits": (lambda metadata: b'{"a": ' + b"9" * 5000 + b"}", "this is no JSON text"),
}


@pytest.mark.parametrize("fault", WRONG_METADATA)
def test_metadata_that_are_none(whole, command, fault):
    change, words = WRONG_METADATA[fault]
    change_metadata(whole, change)
    assert_refused(whole, words, command)


def test_metadata_cannot_spoil_the_output(whole, command):
    """Names and values stand as JSON writes them: no sign of theirs moves the cursor, or begins a line."""
    change_metadata(whole, lambda metadata: {"a\nb\x1b[2J": "\ud800", "k" * 10**5: "v" * 10**5})
    status, output, errors = command("info", whole)
    assert (status, errors) == (0, "")
    assert r"a\nb\u001b[2J" in output and "\x1b" not in output and len(output) < 3000


# The parts


@pytest.mark.parametrize(
    "name",
    ["..", "../elsewhere", "/tmp", "step-00000001.parts/..", "step-00000001.parts/", "step-00000002.parts", "parts",
     "step-00000001.parts.1", "step-00000001.٣.parts", "step-00000001.1.2.parts", ["step-00000001.parts"], None],
    ids=str,
)  # fmt: skip
def test_directory_of_parts_that_leads_elsewhere(parted, command, name):
    change_index(parted, lambda index: put(index, ["parts"], name))
    assert_refused(parted, "parts: .* is not allowed", command)


@pytest.mark.parametrize("what", ["directory", "file"])
def test_parts_that_are_links(parted, command, what):
    parts = parted.parent / "step-00000001.parts"
    path = parts if what == "directory" else parts / "0001.h5"
    path.rename(parted.parent / "elsewhere")
    path.symlink_to(parted.parent / "elsewhere")
    assert_refused(parted, "it is a link, or its directory is", command)


WRONG_PARTS = {
    "external link": lambda file: move(file, lambda name: put_link(file, name, h5py.ExternalLink("/etc/passwd", "x"))),
    "soft link": lambda file: move(file, lambda name: put_link(file, name, h5py.SoftLink("/moved"))),
    "one more": lambda file: file.create_dataset("more", data=np.zeros(3)),
    "another shape": lambda file: move(file, lambda name: file.create_dataset(name, data=np.zeros((2, 2)))),
    "another dtype": lambda file: move(file, lambda name: file.create_dataset(name, data=np.zeros((4, 2), "f4"))),
    "chunks": lambda file: move(file, lambda name: file.create_dataset(name, data=np.zeros((4, 2)), chunks=(1, 2))),
    "virtual": lambda file: move(file, lambda name: put_virtual(file, name, "/etc/passwd", (4, 2))),
    "in other files": lambda file: move(file, lambda name: put_external(file, name, (4, 2))),
}


def move(file, put_another):
    name = f"{NAME}/0"
    values = file[name][()]
    del file[name]
    assert values.shape == (4, 2)
    put_another(name)


def put_link(file, name, link):
    file[name] = link


def put_external(file, name, shape, dtype="f8"):
    file.create_dataset(name, shape, dtype, external=[("/etc/passwd", 0, 10**6)])


def put_virtual(file, name, source, shape, dataset=NAME):
    layout = h5py.VirtualLayout(shape, "f8")
    layout[...] = h5py.VirtualSource(source, dataset, shape, "f8")
    file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("fault", WRONG_PARTS)
def test_parts_with_something_else(parted, command, fault):
    change_part(parted, 0, WRONG_PARTS[fault])
    assert_refused(parted, r"is damaged \((step-00000001.parts/0000.h5|group|parameters|more|'more')", command)


# The structure of the main file


def replace(make):
    """A change of the main file that puts another object into the place of an array of shape (6, 2)."""

    def change(file):
        del file[NAME]
        make(file, NAME)

    return change


def rows_of_parts(*pieces, dataset="{name}/{row}"):
    """A virtual dataset of pieces: rows from, to and part."""

    def make(file, name):
        layout = h5py.VirtualLayout((6, 2), "f8")
        for first, last, part, source_row in pieces:
            source = dataset.format(name=name, row=source_row)
            layout[first:last] = h5py.VirtualSource(part, source, (last - first, 2), "f8")
        file.create_virtual_dataset(name, layout)

    return replace(make)


def columns_of_parts(file):
    layout = h5py.VirtualLayout((6, 2), "f8")
    for column in range(2):
        layout[:, column] = h5py.VirtualSource(P0, f"{NAME}/0", (6,), "f8")
    file.create_virtual_dataset(NAME, layout)


P0, P1 = "step-00000001.parts/0000.h5", "step-00000001.parts/0001.h5"

WRONG_STRUCTURE = {
    "external link": (replace(lambda f, n: put_link(f, n, h5py.ExternalLink("other.h5", NAME))), "a link to somewhere"),
    "soft link": (replace(lambda f, n: put_link(f, n, h5py.SoftLink("/parameters/1.bias"))), "is a link to somewhere"),
    "linked group": (lambda f: [f.move("parameters", "q"), put_link(f, "parameters", h5py.SoftLink("/q"))], "members"),
    "external storage": (replace(lambda f, n: put_external(f, n, (6, 2))), "has values in other files"),
    "group": (replace(lambda f, n: f.create_group(n)), "is a group"),
    "named type": (replace(lambda f, n: put_link(f, n, np.dtype("f8"))), "is a group or a type"),
    "chunks": (replace(lambda f, n: f.create_dataset(n, (6, 2), "f8", chunks=(1, 2))), "is not stored in one piece"),
    "compression": (
        replace(lambda f, n: f.create_dataset(n, data=np.zeros((6, 2)), compression="gzip")),
        "is not stored in one piece",
    ),
    "no values": (replace(lambda f, n: f.create_dataset(n, (6, 2), "f8")), "has 0 bytes, and its shape needs 96"),
    "empty": (replace(lambda f, n: put_link(f, n, h5py.Empty("f8"))), "has shape and type"),
    "texts": (
        replace(lambda f, n: f.create_dataset(n, (6, 2), h5py.string_dtype(), data=[["a", "b"]] * 6)),
        "has shape and type",
    ),
    "references": (replace(lambda f, n: f.create_dataset(n, (6, 2), h5py.ref_dtype)), "has shape and type"),
    "one more": (lambda f: f.create_dataset("more", data=1), "group '' has 4 members, not 3"),
    "one more group": (lambda f: f.create_group("parameters/more"), "group 'parameters' has 3 members, not 2"),
    "one more text": (lambda f: f.create_dataset("checkpoint/more", data=1), "group 'checkpoint' has 3 members"),
    "shared bytes": (lambda f: share(f), "shares bytes with another dataset"),
    "group in itself": (lambda f: [f.pop("parameters"), put_link(f, "parameters", f["/"])], "group 'parameters' has"),
    "index elsewhere": (lambda f: text_elsewhere(f, h5py.ExternalLink("other.h5", INDEX)), "link to somewhere else"),
    "virtual": (replace(lambda f, n: put_virtual(f, n, "other.h5", (6, 2))), "lacks rows after the first 0"),
    "virtual of this file": (replace(lambda f, n: put_virtual(f, n, ".", (6, 2))), "lacks rows after the first 0"),
}  # fmt: skip


def share(file):
    """Two names for one dataset."""
    del file["parameters/1.bias"]
    file["parameters/1.bias"] = file[NAME]
    index = {"step": 1, "parts": "", "checksums": []}
    described = {name: {"name": name, "shape": [6, 2], "dtype": "<f8"} for name in (NAME, "parameters/1.bias")}
    scalar = {"name": "buffers/2.mean", "shape": [], "dtype": "<f8"}
    set_text(file, INDEX, index | {"arrays": [*described.values(), scalar]})


def text_elsewhere(file, link):
    del file[INDEX]
    file[INDEX] = link


@pytest.fixture
def bait(tmp_path):
    """A file of somebody that must not be read, whose values are 666."""
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file[NAME] = np.full((6, 2), 666.0)
    return tmp_path / "other.h5"


@pytest.mark.usefixtures("bait")
@pytest.mark.parametrize("fault", WRONG_STRUCTURE)
def test_structure_of_another_kind(whole, command, fault):
    change, words = WRONG_STRUCTURE[fault]
    with as_hdf5(whole) as file:
        change(file)
    assert_refused(whole, words, command)


VIRTUAL = {
    "another file": (rows_of_parts((0, 4, P0, 0), (4, 6, "other.h5", 4)), "'other.h5', which is no part"),
    "absolute": (rows_of_parts((0, 4, P0, 0), (4, 6, "/etc/passwd", 4)), "'/etc/passwd', which is no part"),
    "another way to a part": (rows_of_parts((0, 4, P0, 0), (4, 6, f"./{P1}", 4)), "which is no part"),
    "rows missing": (rows_of_parts((0, 4, P0, 0)), "lacks rows after the first 4"),
    "rows twice": (rows_of_parts((0, 4, P0, 0), (3, 6, P1, 4)), "lacks rows after the first 4"),
    "another slab": (rows_of_parts((0, 4, P0, 0), (4, 6, P1, 0)), "lacks rows after the first 4"),
    "another array": (rows_of_parts((0, 4, P0, 0), (4, 6, P1, 4), dataset="parameters/1.bias/{row}"), "lacks rows"),
    "in the wrong part": (rows_of_parts((0, 4, P1, 0), (4, 6, P0, 4)), "is missing|members"),
    "nothing": (rows_of_parts(), "lacks rows|is not stored in one piece|has 0 bytes"),
    "columns": (replace(lambda f, n: columns_of_parts(f)), "is put together of other pieces than rows"),
}


@pytest.mark.usefixtures("bait")
@pytest.mark.parametrize("fault", VIRTUAL)
def test_virtual_datasets_of_other_sources(parted, command, fault):
    change, words = VIRTUAL[fault]
    with as_hdf5(parted) as file:
        change(file)
    assert_refused(parted, words, command)


def test_a_huge_shape_over_nothing_costs_nothing(whole, command):
    """Neither memory nor time is given to what a file only claims to have."""
    with as_hdf5(whole) as file:
        del file[NAME]
        file.create_dataset(NAME, (2**40, 2), "f8")
    change_index(whole, lambda index: put(index, ["arrays", 0, "shape"], [2**40, 2]))
    begun = time.monotonic()
    assert_refused(whole, "has 0 bytes, and its shape needs", command)
    assert time.monotonic() - begun < 5.0


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_is_saved_is_accepted(tmp_path, command, ranks):
    """Also arrays of no elements, scalars, all types, and names that are unusual."""
    arrays = {f"types/{name}": np.arange(7).astype(name) for name in ("f2", "f4", ">f8", "c16", "i1", "u8", "?")}
    arrays |= {"parameters/none": np.zeros((0, 3)), "parameters/ρ of a b": np.ones(5), "scalar": np.array(3)}
    path = save(tmp_path, ranks, arrays)
    with Checkpoint(path) as checkpoint:
        checkpoint.verify()
        for name, values in arrays.items():
            assert checkpoint.read(name).tobytes() == values.tobytes()
    assert command("verify", path)[0] == 0
    assert command("to-torch", path, tmp_path / "out.pt")[0] == 0


def test_types_that_torch_lacks(tmp_path, command):
    swapped = save(tmp_path / "a", 1, {"parameters/a": np.arange(3.0).astype(">f4")})
    assert command("to-torch", swapped, tmp_path / "out.pt")[0] == 0
    assert torch.load(tmp_path / "out.pt", weights_only=True)["a"].tolist() == [0.0, 1.0, 2.0]
    long = save(tmp_path / "b", 1, {"parameters/a": np.arange(3.0).astype(np.longdouble)})
    status, output, errors = command("to-torch", long, tmp_path / "other.pt")
    assert (status, output, errors.count("\n")) == (2, "", 1) and "which torch lacks" in errors


# The seal


def write_seal(path, regions, number=None):
    """Another table of regions, with right checksums of its own."""
    end = seals.SealedFile(path).end
    table = np.array(regions, "<i8").tobytes()
    count = len(regions) if number is None else number
    fields = seals.FIELDS.pack(seals.MAGIC, seals.VERSION, count, zlib.crc32(table))
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(end)
        file.write(table + fields + struct.pack("<I", zlib.crc32(fields)))


SEALS = {
    "none": lambda regions, end: [],
    "one less": lambda regions, end: regions[:-1],
    "not in order": lambda regions, end: regions[::-1],
    "one twice": lambda regions, end: [regions[0], *regions],
    "negative length": lambda regions, end: [(0, -1, 0, 0), *regions],
    "negative start": lambda regions, end: [(-end, end, 0, 1), *regions],
    "no length": lambda regions, end: [(0, 0, 0, 0), *regions],
    "behind the end": lambda regions, end: [*regions, (end, 2**62, 0, 1)],
    "another kind": lambda regions, end: [(*region[:3], 7) for region in regions],
}


@pytest.mark.parametrize("fault", SEALS)
def test_seal_of_another_file(whole, command, fault):
    sealed = seals.SealedFile(whole)
    write_seal(whole, SEALS[fault]([tuple(region) for region in sealed.regions], sealed.end))
    assert_refused(whole, "its table of checksums", command)


@pytest.mark.parametrize("number", [0, 1, 2**31, 2**32 - 1])
def test_seal_with_another_number_of_regions(whole, command, number):
    write_seal(whole, [tuple(region) for region in seals.SealedFile(whole).regions], number)
    assert_refused(whole, "its table of checksums", command)


# Elsewhere


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "loop"])
def test_what_is_no_file(tmp_path, command, kind):
    path = tmp_path / "step-00000001.h5"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        (tmp_path / "run").mkdir()
        path = tmp_path / "run"
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    status, output, errors = command("info", path)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert "cannot be read" in errors or "has no checkpoint in it" in errors


def test_parts_of_a_foreign_checkpoint_are_not_used(parted):
    """Nor removed, where it cannot be told."""
    parts = parted.parent / "step-00000001.parts"
    assert is_used(parts, parted)
    change_index(parted, lambda index: put(index, ["parts"], ["step-00000001.parts"]))
    assert is_used(parts, parted)
    change_index(parted, lambda index: [])
    assert is_used(parts, parted)


@pytest.mark.parametrize(("place", "value"), [((3, 1), np.nan), ((0, 0), np.inf), ((5, 0), -np.inf)])
def test_verify_names_parameters_that_are_not_finite(tmp_path, command, place, value):
    """Buffers may hold them: a mask has -inf."""
    values = np.zeros((6, 2))
    values[place] = value
    path = save(tmp_path, 1, {NAME: values, "buffers/mask": np.array([-np.inf, np.nan])})
    status, output, errors = command("verify", path)
    assert (status, errors) == (1, "")
    assert f"{NAME} has {value} at {list(place)}; give" in output and output.count("\n") == 1


def test_index_of_a_thousand_arrays_opens_fast(tmp_path):
    path = save(tmp_path, 2, {f"parameters/{number}.weight": np.zeros((2, 3)) for number in range(1000)})
    begun = time.monotonic()
    Checkpoint(path).close()
    assert time.monotonic() - begun < 3.0


def test_seal_can_be_made_again(whole):
    """What the other tests rely on."""
    with resealed(whole):
        pass
    with Checkpoint(whole) as checkpoint:
        checkpoint.verify()
        assert checkpoint.metadata == {"step": 1}
    with as_hdf5(whole) as file:
        set_text(file, METADATA, {"step": 2})
    with Checkpoint(whole) as checkpoint:
        assert checkpoint.metadata == {"step": 2}
