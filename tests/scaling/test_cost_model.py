"""The cost model against values computed by hand, and its fit against records that it made up itself."""

import json
from dataclasses import replace
from typing import NamedTuple

import pytest
import yaml
from scaling_runs import point_of, record_of, shape_of

from apts_mpi.errors import InvalidInput
from apts_mpi.scaling import cost_model
from apts_mpi.scaling.__main__ import main
from apts_mpi.scaling.adding import REDUCED_MODELS
from apts_mpi.scaling.cost_fit import extrapolate, first_limit, fit, fit_reduced_model, held_out, predicted
from apts_mpi.scaling.cost_model import Shape, seconds_of, terms
from apts_mpi.scaling.predict import point_of as point_of_run
from apts_mpi.scaling.studies import Studies, write_studies
from apts_mpi.staged.schedules import ideal_bubble

REDUCED = {"column": 1e-5, "pair": 2e-7, "cube": 3e-9}
VALUES = REDUCED | {
    "latency": 2e-5,
    "byte": 3e-10,
    "gradient": 4e-6,
    "pass": 5e-4,
    "tangent": 6e-6,
    "statistics": 7e-6,
    "factorisation": 8e-3,
    "fixed": 9e-3,
}
STUDIES = [(layout, kind) for layout in ("replicated", "staged") for kind in ("strong", "weak")]


class Collective(NamedTuple):
    operation: str
    ranks: int
    size: float
    latencies: int
    sent: float


COLLECTIVES = [
    # Recursive doubling: all of it in each of three rounds.
    Collective("allreduce", ranks=8, size=1024, latencies=3, sent=3 * 1024),
    # Rabenseifner: 4000 + 2000 + 1000 there and back.
    Collective("allreduce", ranks=8, size=8000, latencies=6, sent=14000),
    Collective("allreduce", ranks=5, size=8000, latencies=6, sent=12800),
    Collective("reduction", ranks=8, size=8, latencies=3, sent=24),
    Collective("reduction", ranks=4, size=4096, latencies=4, sent=6144),
    Collective("allgather", ranks=8, size=8000, latencies=3, sent=7000),  # 1000 + 2000 + 4000
    Collective("allgather", ranks=8, size=800000, latencies=7, sent=700000),  # a ring, seven times 100000
    Collective("gather", ranks=8, size=800, latencies=3, sent=700),  # 100 + 200 + 400 on the way to the root
    Collective("broadcast", ranks=8, size=100, latencies=3, sent=300),
    Collective("broadcast", ranks=4, size=1_000_000, latencies=2, sent=2_000_000),
    # 40 + 20 + 10 scattered, 10 + 20 + 40 by recursive doubling.
    Collective("broadcast", ranks=8, size=80_000, latencies=6, sent=140_000),
    # No power of two: 8/9 in four rounds, 8/9 in a ring of eight steps.
    Collective("broadcast", ranks=9, size=90_000, latencies=12, sent=160_000),
    Collective("broadcast", ranks=16, size=12_287, latencies=4, sent=49_148),
    Collective("broadcast", ranks=16, size=12_288, latencies=8, sent=23_040),
    Collective("broadcast", ranks=8, size=524_287, latencies=6, sent=1.75 * 524_287),
    Collective("broadcast", ranks=8, size=524_288, latencies=10, sent=917_504),
    # 7/8 scattered in three rounds, 7/8 in a ring of seven steps.
    Collective("broadcast", ranks=8, size=1_000_000, latencies=10, sent=1_750_000),
    *(
        Collective(operation, ranks=1, size=1e6, latencies=0, sent=0)
        for operation in ("allreduce", "allgather", "gather", "broadcast", "reduction")
    ),
]


@pytest.mark.parametrize("case", COLLECTIVES, ids=lambda case: "-".join(map(str, case)))
def test_collectives(case):
    found = getattr(cost_model, case.operation)(case.ranks, case.size)
    assert (found["latency"], found["byte"]) == (case.latencies, pytest.approx(case.sent))


def test_barrier():
    assert [cost_model.barrier(ranks)["latency"] for ranks in (1, 2, 5, 8)] == [0, 1, 3, 3]


def small(layout, **others):
    """Four ranks, 400 samples, 1,000 parameters of eight bytes, eight columns on half of the samples."""
    return Shape(layout, 4, 4, 400, 1000, 8, columns=2, coarse_share=0.5, **others)


def test_replicated():
    found = terms(small("replicated"))
    expected = {
        "gradient evaluations": {"gradient": 4 / 3 * 100, "pass": 3},
        "local solves": {"statistics": 25, "factorisation": 0.25},
        # A quarter of the network with the activations and 2, 4, 6, 8 tangents, each a third of an evaluation.
        "Jacobian products": {"tangent": 50 * (3 + 5 + 7 + 9) / 4 / 3, "pass": 1},
        "reduced model": {"column": 8, "pair": 64, "cube": 512},
        "gradient sum": {"latency": 4, "byte": 12000},
        "assembly": {"latency": 2, "byte": 6000},
        "coarse reduction": {"latency": 2 + 2 + 2, "byte": 2 * 512 + 2 * 8 + 2 * 64},
        # Gathers of 192, broadcasts of a length and a record, and twice two allgathers of 32 and 256.
        "agreement": {"latency": 2 + 2 + 2 + 2 * 4, "byte": 144 + 16 + 128 + 2 * (24 + 192)},
        "fixed": {"fixed": 1.0},
    }
    assert found.keys() == expected.keys()
    for name, amounts in expected.items():
        assert found[name] == pytest.approx(amounts), name


def test_staged():
    found = terms(small("staged", micro_batches=2, activation_bytes=10.0))
    work, bubble = found["gradient evaluations"], found["pipeline bubble"]
    assert work == pytest.approx({"gradient": 4 / 3 * 100, "pass": 6})
    for name, amount in work.items():
        assert bubble[name] / (bubble[name] + amount) == pytest.approx(ideal_bubble(4, 2))
    # One micro-batch of 100 through all stages; then one more through the last, with all nine.
    assert found["Jacobian products"]["tangent"] == pytest.approx(100 * (3 + 5 + 7 + 9) / 4 / 3 + 100 * 9 / 4 / 3)
    # Four hops of 200 samples, three times; then with 2, 4, 6 tangents over the borders, and once more with 6.
    sent = 3 * 4 * 10 * 200 + 10 * 100 * (3 + 5 + 7 + 7)
    assert found["pipeline messages"] == pytest.approx({"latency": 16, "byte": sent})
    assert found["gradient sum"] == {"latency": 0, "byte": 0}
    assert found["reduced model"] == {"column": 8, "pair": 4, "cube": 512}


def test_replicas_share_the_samples_and_sum_the_gradient():
    found = terms(Shape("staged", 8, 4, 800, 1000, 8, micro_batches=2))
    assert found["gradient evaluations"]["gradient"] == pytest.approx(4 / 3 * 100)
    assert found["gradient sum"] == {"latency": 1, "byte": 2000 * 1}  # a quarter of the parameters, among two
    assert terms(Shape("replicated", 8, 4, 800, 1000))["gradient evaluations"]["gradient"] == pytest.approx(4 / 3 * 100)


def test_ranks_in_the_bubble_leave_their_core_to_others():
    alone, shared = (predicted(small("staged", cores=cores), VALUES) for cores in (0, 2))
    bubble = alone["pipeline bubble"]
    assert shared["pipeline bubble"] == bubble > 0.0
    assert sum(shared.values()) - bubble == pytest.approx(2.0 * (sum(alone.values()) - bubble), rel=1e-12)


def test_ranks_that_share_cores_take_as_much_longer():
    alone, shared = (sum(predicted(small("replicated", cores=cores), VALUES).values()) for cores in (0, 2))
    assert shared == pytest.approx(2 * alone)


def test_serial_has_no_messages():
    for layout in ("replicated", "staged"):
        amounts = terms(Shape(layout, 1, 8, 400, 1000)).values()
        assert not any(part.get(name) for part in amounts for name in ("latency", "byte"))


def test_the_fit_finds_what_made_the_records():
    points = [
        point_of(shape_of(layout, kind, ranks, cores=2), VALUES) for layout, kind in STUDIES for ranks in (1, 2, 4, 8)
    ]
    assert fit(points, REDUCED) == pytest.approx(VALUES, rel=1e-6)  # solving squares no condition number: 1e-10 or so
    errors = held_out(points, REDUCED)
    assert errors.keys() == {1, 2, 4, 8}
    for found in errors.values():
        assert len(found) == len(STUDIES)
        for point, seconds in found:
            assert seconds == pytest.approx(point.seconds, rel=1e-6)


def test_values_are_not_negative():
    """An iteration that is faster than its parts gives nothing to the messages, not less."""
    points = [point_of(shape_of("replicated", "strong", ranks), VALUES) for ranks in (1, 2)]
    points[1] = type(points[1])(points[1].shape, 0.5 * points[1].seconds, points[1].events)
    found = fit(points, REDUCED)
    assert min(found.values()) >= 0.0 and found["byte"] == 0.0


def test_the_reduced_model_is_fitted_to_its_times():
    columns = (16, 64, 256)
    seconds = [seconds_of({"column": m, "pair": m**2, "cube": m**3}, REDUCED) for m in columns]
    assert fit_reduced_model(columns, seconds) == pytest.approx(REDUCED, rel=1e-9)


def test_the_first_limit():
    """A second of evaluations, and milliseconds a message.

    At 16 ranks 4 MB of gradient in four buckets take 4 x 8 messages, the ring of the assembly 15, the agreement
    4 + 4 + 4 + 2 x 8 and the coarse level 8 + 4 + 4: 91 ms beside 1/16 s. At 8 they take 24, 7, 21 and 12, beside
    1/8 s.
    """
    values = dict.fromkeys(VALUES, 0.0) | {"gradient": 1.0 / (4 / 3 * 4800), "latency": 1e-3}
    shapes = extrapolate(shape_of("replicated", "strong", 8), "strong", 1000)
    assert [shape.ranks for shape in shapes] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
    limit = first_limit(shapes, values)
    assert (limit.ranks, limit.term) == (16, "gradient sum")
    assert limit.share == pytest.approx(0.032 / (0.091 + 1 / 16))
    assert first_limit(shapes, values | {"latency": 0.0}).ranks is None


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
    assert terms(shape)["Jacobian products"]["tangent"] == pytest.approx(samples * (1 + (16 + 2) / 2) / 3)


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
        main(["predict", *arguments])
    return end.value.code


def test_predict(tmp_path, capsys):
    """The command finds the values in a file, its errors vanish, and it names the term that is the worst."""
    values = VALUES | {"byte": 1e-6}
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
    assert "strong, replicated: limited first by the gradient sum: at" in text and "s a byte (β)" in text
    picture = (tmp_path / "picture.svg").read_text()
    for word in ("weak, staged", "gradient sum", "measured", "measured, / ranks a core", "seconds an iteration"):
        assert f"<!-- {word} -->" in picture
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_two_sizes_leave_no_error(tmp_path, capsys):
    records = [record_of("strong", shape_of("replicated", "strong", ranks), VALUES) for ranks in (1, 2)]
    assert call(write(tmp_path / "studies.h5", records)) == 0
    assert "the error is not known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([("replicated", 2)], "the runs are all of [2] ranks; measure one more size"),
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
        fit([point_of(shape_of("replicated", "strong", 1), VALUES)], REDUCED)
