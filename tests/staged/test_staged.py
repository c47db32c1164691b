"""Teams staged: the iterates of the replicated inexact variant, whatever ranks, micro-batches and schedule."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from networks import options
from staged_networks import NETWORKS, built, compare, staged, trace

from apts_mpi import StagedAPTS

SCHEDULES = ["gpipe", "1f1b"]

# Gradients of tuples are compared with those of torch, in test_pipeline.
PLAIN = [name for name in NETWORKS if "tuples" not in name]


@pytest.mark.mpi
@pytest.mark.all_sizes(name="mlp", micro_batches=5, schedule="1f1b")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("micro_batches", [1, 2, 5])
@pytest.mark.parametrize("name", PLAIN)
def test_staged_equals_replicated(world, monkeypatch, name, micro_batches, schedule):
    chosen = staged(
        options(subdomains=None, initial_radius=0.1),
        solver="tr",
        iterations=2,
        micro_batches=micro_batches,
        schedule=schedule,
    )
    compare(world, chosen, name, monkeypatch)


@pytest.mark.mpi
@pytest.mark.all_sizes(name="mlp", solver="kfac")
@pytest.mark.parametrize("solver", ["kfac", "adam"])
@pytest.mark.parametrize("name", [*PLAIN, "tuples"])
def test_coarse_level_and_global_step(world, monkeypatch, name, solver):
    chosen = staged(
        options(subdomains=None, global_step="first-order", initial_radius=0.1),
        coarse="gauss-newton",
        solver=solver,
        iterations=2,
        micro_batches=2,
    )
    compare(world, chosen, name, monkeypatch)


class SecondOrder(NamedTuple):
    network: str
    model: str
    product: str
    solver: str


# With kfac the blocks of the Schwarz level precondition steihaug.
SECOND_ORDER = [
    SecondOrder("mlp", model="lsr1", product="hessian", solver="kfac"),
    SecondOrder("cnn", model="lsr1", product="hessian", solver="adam"),
    SecondOrder("gpt", model="steihaug", product="gauss-newton", solver="kfac"),
    SecondOrder("resnet", model="steihaug", product="hessian", solver="kfac"),
    SecondOrder("tuples", model="steihaug", product="gauss-newton", solver="adam"),
    SecondOrder("double tuples", model="steihaug", product="hessian", solver="adam"),
    SecondOrder("trees", model="steihaug", product="gauss-newton", solver="adam"),
]


@pytest.mark.mpi
@pytest.mark.all_sizes(case=SECOND_ORDER[0])
@pytest.mark.parametrize("case", SECOND_ORDER, ids="-".join)
def test_global_steps_of_second_order(world, monkeypatch, case):
    chosen = options(subdomains=None, global_step=case.model, initial_radius=0.1)
    chosen = staged(chosen, solver=case.solver, micro_batches=2)
    chosen = replace(chosen, global_step=replace(chosen.global_step, product=case.product))
    compare(world, chosen, case.network, monkeypatch)


@pytest.mark.mpi
@pytest.mark.all_sizes(name="mlp")
@pytest.mark.parametrize(
    ("name", "coarse", "changes"),
    [
        ("mlp", "none", {"subdomains": 9, "norm": "inf"}),
        ("cnn", "gauss-newton", {"subdomains": None, "initial_radius": 0.05}),
        ("double tuples", "gauss-newton", {"subdomains": None}),
        ("trees", "gauss-newton", {"subdomains": None}),
    ],
)
def test_dense_gauss_newton(world, monkeypatch, name, coarse, changes):
    """The rows of all outputs travel backwards; damped, so that solving does not magnify rounding."""
    chosen = staged(
        options(**{"initial_radius": 0.3} | changes),
        coarse=coarse,
        solver="gauss-newton",
        micro_batches=3,
    )
    chosen = replace(chosen, local=replace(chosen.local, damping=0.1))
    compare(world, chosen, name, monkeypatch)


# In the maximum norm not with sgd or tr: where tanh saturates the sign of rounding would count.
CHOICES = [
    {"solver": "lsr1", "iterations": 2},
    {"solver": "steihaug", "iterations": 2},
    {"solver": "adam", "norm": "inf"},
    {"solver": "kfac", "coarse": "gauss-newton", "norm": "inf"},
    {"solver": "kfac", "coarse": "gauss-newton", "initial_radius": 30.0},
    {"solver": "sgd", "iterations": 3, "window": 3, "damping": 0.5, "initial_radius": 30.0},
    {"solver": "adam", "iterations": 2, "recompute": True},
    {"solver": "kfac", "recompute": True, "schedule": "gpipe"},
    {"solver": "muon"},
    {"solver": "tr", "cache_dtype": "float64"},
]


@pytest.mark.mpi
@pytest.mark.all_sizes(choice=CHOICES[0])
@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(map(str, choice.values())))
def test_other_options(world, monkeypatch, choice):
    pipeline = {"coarse", "solver", "iterations", "recompute", "schedule", "cache_dtype"}
    plain = {name: value for name, value in choice.items() if name not in pipeline}
    chosen = staged(
        options(**{"subdomains": None, "initial_radius": 0.2} | plain),
        micro_batches=3,
        **{name: value for name, value in choice.items() if name in pipeline},
    )
    compare(world, chosen, "mlp", monkeypatch)


@pytest.mark.mpi
@pytest.mark.all_sizes(coarse="gauss-newton")
@pytest.mark.parametrize("coarse", ["none", "gauss-newton"])
def test_nine_subdomains_on_any_number_of_stages(world, monkeypatch, coarse):
    """Several a stage."""
    chosen = staged(options(subdomains=9, initial_radius=0.2), coarse=coarse, solver="kfac", micro_batches=2)
    compare(world, chosen, "mlp", monkeypatch)


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes(coarse="gauss-newton", solver="kfac")
@pytest.mark.parametrize("coarse", ["none", "gauss-newton"])
@pytest.mark.parametrize("solver", ["kfac", "tr"])
def test_two_replicas(world, monkeypatch, coarse, solver):
    """At four ranks two stages with two replicas each; a replica has half of every batch."""
    if world.size % 2:
        pytest.skip("needs an even number of ranks")
    chosen = staged(
        options(subdomains=None, replicas=2, global_step="first-order", initial_radius=0.2),
        coarse=coarse,
        solver=solver,
        iterations=2,
        micro_batches=3,
    )
    compare(world, chosen, "mlp", monkeypatch)


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes(model="lsr1")
@pytest.mark.parametrize("model", ["lsr1", "steihaug"])
def test_two_replicas_with_global_steps_of_second_order(world, monkeypatch, model):
    if world.size % 2:
        pytest.skip("needs an even number of ranks")
    chosen = staged(
        options(subdomains=None, replicas=2, global_step=model, initial_radius=0.2),
        solver="kfac",
        micro_batches=3,
        schedule="gpipe",
    )
    compare(world, chosen, "mlp", monkeypatch)


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_schedules_are_equal_to_the_bit(world):
    builder, batches, loss = NETWORKS["mlp"]
    runs = []
    for schedule in SCHEDULES:
        network = built(builder)
        chosen = staged(
            options(subdomains=None), coarse="gauss-newton", solver="kfac", micro_batches=5, schedule=schedule
        )
        found = trace(StagedAPTS(network, loss, comm=world, options=chosen), batches)
        runs.append((found, network.state_dict()))
    assert runs[0][0] == runs[1][0]
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name])
