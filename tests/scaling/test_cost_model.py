"""The cost model against values computed by hand, and its fit against records that it made up itself."""

import json
from dataclasses import replace

import pytest
import yaml
from scaling_runs import MACHINE, NETWORK, point_of, record_of, shape_of

from apts_mpi.errors import InvalidInput
from apts_mpi.scaling.__main__ import main
from apts_mpi.scaling.adding import REDUCED_MODELS
from apts_mpi.scaling.calls import Call, Exchanges
from apts_mpi.scaling.cost_fit import extrapolate, first_limit, fit, fit_reduced_model, held_out, predicted
from apts_mpi.scaling.cost_model import Shape, parts, seconds_of, terms
from apts_mpi.scaling.predict import point_of as point_of_run
from apts_mpi.scaling.studies import Studies, write_studies
from apts_mpi.staged.schedules import ideal_bubble

REDUCED = {"column": 1e-5, "pair": 2e-7, "cube": 3e-9}
VALUES = REDUCED | {
    "call": 2e-4,
    "gradient": 4e-6,
    "pass": 5e-4,
    "tangent": 6e-6,
    "statistics": 7e-6,
    "factorisation": 8e-3,
    "fixed": 9e-3,
}
STUDIES = [(layout, kind) for layout in ("replicated", "staged") for kind in ("strong", "weak")]


def small(layout, **others):
    """Four ranks, 400 samples, 1,000 parameters of eight bytes, eight columns on half of the samples."""
    return Shape(layout, 4, 4, 400, 1000, 8, columns=2, coarse_share=0.5, **others)


def test_replicated():
    exchanges = Exchanges(
        {"global evaluation": (2, 4000.0), "local solves": (1, 500.0), "judge": (3, 48.0), "data": (2, 0)}
    )
    found = parts(small("replicated", exchanges=exchanges))
    work = {
        "gradient evaluations": {"gradient": 4 / 3 * 100, "pass": 3},
        "local solves": {"statistics": 25, "factorisation": 0.25},
        # A quarter of the network with the activations and 2, 4, 6, 8 tangents, each a third of an evaluation.
        "Jacobian products": {"tangent": 50 * (3 + 5 + 7 + 9) / 4 / 3, "pass": 1},
        "reduced model": {"column": 8, "pair": 64, "cube": 512},
        "fixed": {"fixed": 1.0},
    }
    # Counts and bytes of the run; those that grow with ranks or columns by their laws.
    calls = {
        "gradient sum": [Call("allreduce", 4, 4000.0, 2)],
        "statistics sum": [Call("allreduce", 4, 500.0, 1)],
        "assembly": [Call("allgather", 4, 8000)],
        "coarse reduction": [Call("reduction", 4, 512), Call("broadcast", 4, 256)],
        "agreement": [Call("reduction", 4, 48.0, 2), Call("broadcast", 4, 256, 1), Call("allreduce", 4, 32, 2)],
    }
    assert found.keys() == work.keys() | calls.keys()
    for name, amounts in work.items():
        assert found[name].work == pytest.approx(amounts), name
    for name, expected in calls.items():
        assert list(found[name].calls) == expected, name


def test_a_call_and_a_hop_are_two_numbers():
    """What Python costs is counted once a call, however many rounds are within; those are the network's."""
    shape = replace(small("replicated"), ranks=16)
    amounts = terms(shape, MACHINE)["assembly"]
    # Within a leaf of the tree, two of its four links: 8 kB by recursive doubling.
    assert amounts == pytest.approx({"call": 1, "network": 4 * 0.5e-6 + 8000 * 15 / 16 / 12.5e9})


def test_staged():
    shape = small("staged", micro_batches=2, activation_bytes=10.0)
    found = terms(shape, MACHINE)
    work, bubble = found["gradient evaluations"], found["pipeline bubble"]
    assert work == pytest.approx({"gradient": 4 / 3 * 100, "pass": 6})
    for name, amount in work.items():
        assert bubble[name] / (bubble[name] + amount) == pytest.approx(ideal_bubble(4, 2))
    # One micro-batch of 100 through all stages; then one more through the last, with all nine.
    assert found["Jacobian products"]["tangent"] == pytest.approx(100 * (3 + 5 + 7 + 9) / 4 / 3 + 100 * 9 / 4 / 3)
    # Four hops of 200 samples, three times; then with 2, 4, 6 tangents over the borders, and once more with 6.
    activations, tangents = parts(shape)["pipeline messages"].calls
    assert activations == Call("send", 4, 10 * 200, 12, "replica")
    assert (tangents.times, tangents.times * tangents.size) == (4, pytest.approx(10 * 100 * (3 + 5 + 7 + 7)))
    assert found["gradient sum"] == {"call": 0, "network": 0}
    assert found["reduced model"] == {"column": 8, "pair": 4, "cube": 512}


def test_replicas_share_the_samples_and_sum_the_gradient():
    shape = Shape("staged", 8, 4, 800, 1000, 8, micro_batches=2)
    found = parts(shape)
    assert found["gradient evaluations"].work["gradient"] == pytest.approx(4 / 3 * 100)
    # A quarter of the parameters, among two.
    assert found["gradient sum"].calls == (Call("allreduce", 2, 2000.0, 1, "stage"),)
    replicated = parts(Shape("replicated", 8, 4, 800, 1000))
    assert replicated["gradient evaluations"].work["gradient"] == pytest.approx(4 / 3 * 100)


def test_ranks_in_the_bubble_leave_their_core_to_others():
    alone, shared = (predicted(small("staged", cores=cores), VALUES, MACHINE) for cores in (0, 2))
    bubble = alone["pipeline bubble"]
    assert shared["pipeline bubble"] == bubble > 0.0
    assert sum(shared.values()) - bubble == pytest.approx(2.0 * (sum(alone.values()) - bubble), rel=1e-12)


def test_ranks_that_share_cores_take_as_much_longer():
    alone, shared = (sum(predicted(small("replicated", cores=cores), VALUES, MACHINE).values()) for cores in (0, 2))
    assert shared == pytest.approx(2 * alone)


def test_serial_has_no_messages():
    for layout in ("replicated", "staged"):
        amounts = terms(Shape(layout, 1, 8, 400, 1000), MACHINE).values()
        assert not any(part.get(name) for part in amounts for name in ("call", "network"))


def test_the_fit_finds_what_made_the_records():
    points = [
        point_of(shape_of(layout, kind, ranks, cores=2), VALUES) for layout, kind in STUDIES for ranks in (1, 2, 4, 8)
    ]
    assert fit(points, REDUCED, MACHINE) == pytest.approx(
        VALUES, rel=1e-6
    )  # solving squares no condition number: 1e-10 or so
    errors = held_out(points, REDUCED, MACHINE)
    assert errors.keys() == {1, 2, 4, 8}
    for found in errors.values():
        assert len(found) == len(STUDIES)
        for point, seconds in found:
            assert seconds == pytest.approx(point.seconds, rel=1e-6)


def test_values_are_not_negative():
    """An iteration that is faster than its parts gives nothing to the messages, not less."""
    points = [point_of(shape_of("replicated", "strong", ranks), VALUES) for ranks in (1, 2)]
    points[1] = type(points[1])(points[1].shape, 0.5 * points[1].seconds, points[1].events)
    found = fit(points, REDUCED, MACHINE)
    assert min(found.values()) >= 0.0 and found["call"] == 0.0


def test_the_reduced_model_is_fitted_to_its_times():
    columns = (16, 64, 256)
    seconds = [seconds_of({"column": m, "pair": m**2, "cube": m**3}, REDUCED) for m in columns]
    assert fit_reduced_model(columns, seconds) == pytest.approx(REDUCED, rel=1e-9)


def test_the_first_limit():
    """A second of evaluations, and milliseconds a call, of which there are 4, 1, 2 and 4 beside 1/32 s at 32 ranks."""
    values = dict.fromkeys(VALUES, 0.0) | {"gradient": 1.0 / (4 / 3 * 4800), "call": 4e-3}
    shapes = extrapolate(shape_of("replicated", "strong", 8), "strong", 1000)
    assert [shape.ranks for shape in shapes] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
    limit = first_limit(shapes, values, MACHINE)
    assert (limit.ranks, limit.term) == (32, "gradient sum")
    assert limit.share == pytest.approx(0.016 / (0.044 + 1 / 32), rel=0.05)  # beside them the network's milliseconds
    assert first_limit(shapes, values | {"call": 0.0}, MACHINE).ranks > 32


def test_weak_studies_grow():
    shape = extrapolate(shape_of("staged", "weak", 4, cores=2), "weak", 10_000)[-1]
    assert (shape.ranks, shape.subdomains, shape.batch_size, shape.cores) == (10_000, 10_000, 6_000_000, 0)


@pytest.mark.parametrize(
    ("how", "samples"),
    [
        ({}, 512 / 8),
        ({"targets": 64}, 8 / 8),
        ({"coarse_share": 0.25}, 600 / 4),
    ],
)
def test_the_coarse_level_measures_the_batch_that_is_predicted(how, samples):
    """600 samples a rank, on eight ranks: 512 targets of all of them, or a share of each."""
    one = shape_of("replicated", "weak", 1, **how)
    shape = extrapolate(one, "weak", 8)[-1]
    # All 16 columns and their own two, by half of the network, in thirds.
    assert terms(shape, MACHINE)["Jacobian products"]["tangent"] == pytest.approx(samples * (1 + (16 + 2) / 2) / 3)


@pytest.mark.parametrize(
    ("layout", "ranks", "largest", "columns"),
    [("replicated", 32, 128, 64), ("replicated", 100, 128, 128), ("replicated", 100, 7, 6), ("staged", 100, 7, 200)],
)
def test_columns_are_bounded(layout, ranks, largest, columns):
    """But for two a stage."""
    assert replace(shape_of(layout, "weak", ranks), largest=largest).all_columns == columns


def test_a_small_measured_batch_does_not_stay_small():
    """100 samples a rank are all measured on one rank, and 512 of 800 on eight."""
    shape = extrapolate(shape_of("replicated", "weak", 1, batch_size=100), "weak", 8)[-1]
    assert shape.thinning == pytest.approx(512 / 800)


def test_shares_and_targets_come_from_the_records():
    record = record_of("weak", shape_of("replicated", "weak", 1, batch_size=100), VALUES)
    summary = record.summary | {"targets_per_sample": 64}
    shape = point_of_run(replace(record, summary=summary)).shape
    assert (shape.targets, shape.coarse_share, shape.thinning) == (64, None, pytest.approx(8 / 100))
    coarse = record.options["coarse"] | {"samples": 0.25}
    shape = point_of_run(replace(record, configuration=yaml.safe_dump(record.options | {"coarse": coarse}))).shape
    assert shape.thinning == 0.25


def write(path, records):
    reduced = {m: seconds_of({"column": m, "pair": m**2, "cube": m**3}, REDUCED) for m in REDUCED_MODELS}
    write_studies(path, Studies(tuple(records), reduced))
    return str(path)


def call(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["predict", f"--network={NETWORK}", *arguments])
    return end.value.code


def test_predict(tmp_path, capsys):
    """The command finds the values in a file, its errors vanish, and it names the term that is the worst."""
    values = VALUES | {"call": 0.5}
    records = [
        record_of(kind, shape_of(layout, kind, ranks, cores=4), values)
        for layout, kind in STUDIES
        for ranks in (1, 2, 4, 8)
    ]
    file = write(tmp_path / "studies.h5", records)
    assert call(file, f"--json={tmp_path / 'out.json'}", f"--plot={tmp_path / 'picture'}") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["values"] == pytest.approx(values, rel=1e-5)
    assert len(found["errors"]) == 16
    assert all(error["predicted"] == pytest.approx(error["measured"], rel=1e-5) for error in found["errors"])
    assert found["studies"]["strong, replicated"]["limit"]["term"] == "gradient sum"
    assert found["studies"]["weak, staged"]["sizes"][-1]["ranks"] == 10_000
    text = capsys.readouterr().out
    assert "strong, replicated: limited first by the gradient sum: at" in text
    assert "s a call of a collective" in text and "below 1%" in text
    picture = (tmp_path / "picture.svg").read_text()
    for word in ("weak, staged", "gradient sum", "measured", "measured, / ranks a core", "seconds an iteration"):
        assert f"<!-- {word} -->" in picture
    assert (tmp_path / "picture.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([("replicated", 2)], "the runs are of 1 number(s) of ranks, [2], and a fit to fewer than 3"),
        ([("replicated", 1), ("replicated", 2)], "[1, 2], and a fit to fewer than 3 cannot be checked"),
        ([("replicated", 1), ("replicated", 2), ("staged", 1)], "no run has two stages"),
        ([], "the file has no runs"),
    ],
)
def test_too_little_to_fit(tmp_path, capsys, records, message):
    runs = [record_of("strong", shape_of(layout, "strong", ranks), VALUES) for layout, ranks in records]
    assert call(write(tmp_path / "studies.h5", runs)) == 2
    assert message in capsys.readouterr().err


def test_one_size_is_an_error():
    with pytest.raises(InvalidInput, match="one more size"):
        fit([point_of(shape_of("replicated", "strong", 1), VALUES)], REDUCED, MACHINE)
