"""Options are checked when they are made: the message names the option, the bad value and the remedy."""

import dataclasses
import math

import pytest
import torch
from networks import classifier
from torch import nn

from apts_mpi import (
    APTSOptions,
    CoarseOptions,
    GlobalStepOptions,
    InvalidInput,
    LocalOptions,
    PipelineOptions,
    SchwarzOptions,
    TrustRegionOptions,
)
from apts_mpi.curvature.quadratic_loss import is_quadratic
from apts_mpi.defaults import compose, may_be_dense, split_parameters
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.partition import make_subdomains
from apts_mpi.network.segments import SegmentedNetwork
from apts_mpi.problems.losses import token_cross_entropy, weighted_squared_error
from apts_mpi.train.options import TrainingOptions

BAD_VALUES = [
    (APTSOptions, {"group_size": 0}, "group_size: 0 .* give 1 or more"),
    (APTSOptions, {"group_size": 2, "coupled": True}, "group_size: 2 .* give one of the two"),
    (APTSOptions, {"batch": "shard", "coupled": True}, "batch: 'shard' .* choose whole"),
    (SchwarzOptions, {"decomposition": "both"}, "schwarz.decomposition: 'both' .* choose one of parameters, data"),
    (SchwarzOptions, {"variant": "both"}, "schwarz.variant: 'both' .* choose one of .*exact, inexact"),
    (SchwarzOptions, {"partition": "row"}, "schwarz.partition: 'row' .* choose one of auto, layer, index"),
    (
        SchwarzOptions,
        {"partition": "adaptive", "decomposition": "data"},
        "schwarz.partition: 'adaptive' .* choose layer",
    ),
    (SchwarzOptions, {"repartition_every": 0}, "schwarz.repartition_every: 0 .* give 1 or more"),
    (SchwarzOptions, {"overlap": -1}, "schwarz.overlap: -1 .* give 0 or more"),
    (SchwarzOptions, {"type": "additive"}, "schwarz.type: 'additive' .* choose one of basic, restrict"),
    (SchwarzOptions, {"local_data": "half"}, "schwarz.local_data: 'half' .* choose one of .*shard, full"),
    (SchwarzOptions, {"assembly": "sum"}, "schwarz.assembly: 'sum' .* choose mean"),
    (SchwarzOptions, {"assembly": "max"}, "schwarz.assembly: 'max' .* choose one of mean, sum"),
    (SchwarzOptions, {"prediction": "none"}, "schwarz.prediction: 'none' .* choose one of first-order, local"),
    (SchwarzOptions, {"damping": 0.0}, r"schwarz.damping: 0.0 .* give a number in \(0, 1\]"),
    (SchwarzOptions, {"damping": 1.1}, "schwarz.damping: 1.1"),
    (SchwarzOptions, {"damping": math.nan}, "schwarz.damping: nan"),
    (LocalOptions, {"solver": "newton"}, "local.solver: 'newton' .* choose one of .*tr,.* sgd, adam"),
    (LocalOptions, {"product": "fisher"}, "local.product: 'fisher' .* choose one of gauss-newton, hessian"),
    (LocalOptions, {"iterations": 0}, "local.iterations: 0 .* give 1 or more"),
    (LocalOptions, {"damping": -1.0}, "local.damping: -1.0"),
    (LocalOptions, {"decay": 1.0}, "local.decay: 1.0"),
    (LocalOptions, {"refresh": 0}, "local.refresh: 0"),
    (LocalOptions, {"momentum": 1.0}, r"local.momentum: 1.0 .* give a number in \[0, 1\), or null"),
    (CoarseOptions, {"model": "galerkin"}, "coarse.model: 'galerkin'"),
    (CoarseOptions, {"space": "rotations"}, "coarse.space: 'rotations' .* choose one of subdomains, or MODULE:CLASS"),
    (CoarseOptions, {"columns": ("last_step",)}, "coarse.columns: .*include correction"),
    (CoarseOptions, {"columns": ("correction", "noise")}, "coarse.columns: 'noise'"),
    (CoarseOptions, {"columns": ("correction", "correction")}, "coarse.columns: .*give each once"),
    (CoarseOptions, {"largest": 0}, "coarse.largest: 0"),
    (CoarseOptions, {"samples": 0.0}, "coarse.samples: 0.0"),
    (CoarseOptions, {"damping": -0.1}, "coarse.damping: -0.1"),
    (CoarseOptions, {"acceleration": -0.1}, "coarse.acceleration: -0.1"),
    (CoarseOptions, {"momentum": 1.0}, "coarse.momentum: 1.0"),
    (CoarseOptions, {"norm": "inf"}, "coarse.norm: 'inf' .* choose one of auto, 2, scaled"),
    (TrustRegionOptions, {"noise": -1.0}, "trust_region.noise: -1.0 .* 0 or more"),
    (TrustRegionOptions, {"noise": math.nan}, "trust_region.noise: nan"),
    (TrustRegionOptions, {"min_radius": 0.0}, r"trust_region.min_radius, max_radius: \(0.0, 10000.0\)"),
    (
        TrustRegionOptions,
        {"min_radius": 2.0, "max_radius": 1.0},
        r"max_radius: \(2.0, 1.0\) .* min_radius < max_radius",
    ),
    (TrustRegionOptions, {"max_radius": math.inf}, "trust_region.max_radius: inf .* give a finite number"),
    (TrustRegionOptions, {"initial_radius": 2e4}, "initial_radius: 20000.0 .* to max_radius 10000.0, or null"),
    (TrustRegionOptions, {"initial_radius": 1e-9}, "initial_radius: 1e-09"),
    (TrustRegionOptions, {"initial_radius": math.nan}, "initial_radius: nan"),
    (TrustRegionOptions, {"eta1": 0.5, "shrink_below": 0.25}, r"eta1, shrink_below, eta2: \(0.5, 0.25, 0.75\)"),
    (TrustRegionOptions, {"eta1": -0.1}, "eta1"),
    (TrustRegionOptions, {"eta2": 1.0}, "eta2"),
    (TrustRegionOptions, {"decrease_factor": 1.0}, "decrease_factor: 1.0"),
    (TrustRegionOptions, {"increase_factor": 1.0}, "increase_factor: 1.0"),
    (TrustRegionOptions, {"increase_factor": math.inf}, "increase_factor: inf"),
    (TrustRegionOptions, {"norm": "1"}, "trust_region.norm: '1' .* choose one of 2, inf"),
    (TrustRegionOptions, {"metric": "kl"}, "trust_region.metric: 'kl' .* choose one of identity, fisher"),
    (TrustRegionOptions, {"metric": "fisher", "norm": "inf"}, "trust_region.metric: 'fisher' .* or norm 2"),
    (TrustRegionOptions, {"metric_radius": 0.0}, "trust_region.metric_radius: 0.0 .* give a number above 0"),
    (TrustRegionOptions, {"window": -1}, "trust_region.window: -1"),
    (TrustRegionOptions, {"pull": -0.1}, r"trust_region.pull: -0.1 .* give a number in \[0, 1\), or null"),
    (TrustRegionOptions, {"weight_decay": -0.1}, "trust_region.weight_decay: -0.1 .* give 0 or more"),
    (TrustRegionOptions, {"weight_decay": math.inf}, "trust_region.weight_decay: inf .* give a finite number"),
    (TrustRegionOptions, {"grow_from": 1.0}, r"trust_region.grow_from: 1.0 .* give a number in \[0, 1\)"),
    (GlobalStepOptions, {"iterations": 0}, "global_step.iterations: 0 .* give 1 or more"),
    (GlobalStepOptions, {"model": "newton"}, "global_step.model: 'newton' .* choose one of auto, none, first-order"),
    (GlobalStepOptions, {"krylov_tolerance": 1.0}, r"global_step.krylov_tolerance: 1.0 .* give a number in \(0, 1\)"),
    (GlobalStepOptions, {"krylov_products": 0}, "global_step.krylov_products: 0 .* give 1 or more, or null"),
    (LocalOptions, {"krylov_tolerance": 0.0}, r"local.krylov_tolerance: 0.0 .* give a number in \(0, 1\), or null"),
    (LocalOptions, {"krylov_products": -1}, "local.krylov_products: -1 .* give 1 or more, or null"),
    (GlobalStepOptions, {"product": "fisher"}, "global_step.product: 'fisher' .* choose one of gauss-newton, hessian"),
    (PipelineOptions, {"micro_batches": 0}, "pipeline.micro_batches: 0 .* give 1 or more"),
    (PipelineOptions, {"schedule": "zigzag"}, "pipeline.schedule: 'zigzag' .* choose one of gpipe, 1f1b"),
    (PipelineOptions, {"balance": "time"}, "pipeline.balance: 'time' .* choose one of parameters, cost"),
    (PipelineOptions, {"cache_dtype": "int8"}, "pipeline.cache_dtype: 'int8' .* choose one of auto, float64"),
    (APTSOptions, {"stall_timeout": 0.0}, "stall_timeout: 0.0 .* give seconds above 0"),
    (APTSOptions, {"stall_timeout": math.nan}, "stall_timeout: nan"),
    (APTSOptions, {"autocast": "float16"}, "autocast: 'float16' .* choose one of none, bfloat16"),
    (APTSOptions, {"noise": "white"}, "noise: 'white' .* choose one of none, batches"),
    (APTSOptions, {"layout": "sharded"}, "layout: 'sharded' .* choose one of replicated, staged"),
    (APTSOptions, {"subdomains": 0}, "subdomains: 0 .* give 1 or more"),
    (APTSOptions, {"replicas": 0}, "replicas: 0 .* give 1 or more"),
    (APTSOptions, {"batch": "half"}, "batch: 'half' .* choose one of whole, shard"),
    (APTSOptions, {"micro_batch_size": 0}, "micro_batch_size: 0 .* give 1 or more, or auto"),
    (APTSOptions, {"micro_batch_size": "half"}, "micro_batch_size: 'half' .* give 1 or more, or auto"),
    (APTSOptions, {"micro_batch_size": True}, "micro_batch_size: True .* give 1 or more, or auto"),
    (APTSOptions, {"micro_batch_size": None}, "micro_batch_size: None .* give 1 or more, or auto"),
    (APTSOptions, {"micro_batch_size": 2, "group_size": 3}, r"micro_batch_size: 2 .* groups of 3 samples"),
    (APTSOptions, {"micro_batch_size": 2, "coupled": True}, r"micro_batch_size: 2 .* with coupled .* choose auto"),
    (TrainingOptions, {"micro_batch_size": -2}, "micro_batch_size: -2 .* give 1 or more, or auto"),
    (APTSOptions, {"seed": -1}, "seed: -1 .* give 0 or more"),
    (TrainingOptions, {"problem_args": ("width",)}, "problem_args: 'width' is not allowed; give NAME=VALUE"),
    (TrainingOptions, {"network_args": ("=3",)}, "network_args: '=3' is not allowed; give NAME=VALUE"),
    (TrainingOptions, {"method": "aptz"}, "method: 'aptz' .* choose one of two-level, apts"),
    (TrainingOptions, {"method": "apts", "optimizer": "adam"}, "method: 'apts' .* choose that, or two-level"),
    (TrainingOptions, {"method": "apts"}, "coarse.model: 'auto' contradicts --method apts"),
    (TrainingOptions, {"epochs": 0}, "epochs: 0 .* give 1 or more, or null"),
    (TrainingOptions, {"max_iterations": 0}, "max_iterations: 0"),
    (TrainingOptions, {"max_seconds": 0.0}, "max_seconds: 0.0"),
    (TrainingOptions, {"max_cpu_seconds": 0.0}, "max_cpu_seconds: 0.0"),
    (TrainingOptions, {"replay": -1}, "replay: -1 .* give 0 or more"),
    (TrainingOptions, {"resample": 0}, "resample: 0 .* give 1 or more, or null"),
    (TrainingOptions, {"resample_by": "residual"}, "resample_by: 'residual' .* give --resample"),
    (TrainingOptions, {"batch_size": -3}, "batch_size: -3"),
    (TrainingOptions, {"train_samples": 0}, "train_samples: 0"),
    (TrainingOptions, {"dtype": "float16"}, "dtype: 'float16' .* choose one of float32, float64"),
    (TrainingOptions, {"device": "tpu"}, "device: 'tpu' .* choose one of auto, cpu, cuda"),
    (TrainingOptions, {"optimizer": "newton"}, "optimizer: 'newton' .* choose one of apts, adam, sgd, lbfgs"),
    (TrainingOptions, {"learning_rate": 0.0}, "learning_rate: 0.0 .* give a number above 0"),
    (TrainingOptions, {"autocast": "float16"}, "autocast: 'float16' .* choose one of none, bfloat16"),
    (
        TrainingOptions,
        {"autocast": "bfloat16", "dtype": "float64"},
        "autocast: 'bfloat16' .* with dtype float64 choose none, or --dtype float32",
    ),
    (TrainingOptions, {"transport": "pigeon"}, "transport: 'pigeon' .* choose one of auto, staged, direct"),
    (TrainingOptions, {"noise": "white"}, "noise: 'white' .* choose one of auto, none, batches"),
    (TrainingOptions, {"layout": "sharded"}, "layout: 'sharded'"),
    (TrainingOptions, {"subdomains": 0}, "subdomains: 0"),
    (TrainingOptions, {"checkpoint_every": 0}, "checkpoint_every: 0 .* give a number of iterations above 0, a time"),
    (TrainingOptions, {"checkpoint_every": True}, "checkpoint_every: True"),
    (TrainingOptions, {"checkpoint_every": "0min"}, "checkpoint_every: '0min'"),
    (TrainingOptions, {"checkpoint_keep_last": 0}, "checkpoint_keep_last: 0 .* give 1 or more"),
    (TrainingOptions, {"checkpoint_keep_every": -1}, "checkpoint_keep_every: -1 .* give 0 or more"),
    (TrainingOptions, {"drift_check_every": -1}, "drift_check_every: -1 .* give 0 or more"),
    (TrainingOptions, {"patience": 0}, "patience: 0 .* give 1 or more, or null"),
    (TrainingOptions, {"keep_best": True}, "keep_best: True .* give --stop-on"),
    (TrainingOptions, {"gradient_tolerance": -1.0}, "gradient_tolerance: -1.0 .* give 0 or more, or null"),
    (TrainingOptions, {"relative_gradient_tolerance": -1.0}, "relative_gradient_tolerance: -1.0 .* give 0 or more"),
    (TrainingOptions, {"target_loss": math.nan}, "target_loss: nan .* give a finite number"),
    (TrainingOptions, {"torch_profiler": -1}, "torch_profiler: -1 .* give 0 or more"),
    (TrainingOptions, {"average": 1.0}, r"average: 1.0 .* give a number in \[0, 1\), or null"),
    (TrainingOptions, {"progress": "sometimes"}, "progress: .sometimes. .* choose one of auto, always, never"),
    (TrainingOptions, {"logger": "csv,tensorbord"}, "logger: 'tensorbord' .* choose one of csv, tensorboard, mlflow"),
    (TrainingOptions, {"walltime": "1:2"}, "walltime: '1:2' .* give HH:MM:SS"),
    (TrainingOptions, {"stall_timeout": -1.0}, "stall_timeout: -1.0 .* give seconds above 0, or null"),
    (TrainingOptions, {"replicas": 0}, "replicas: 0"),
    (TrainingOptions, {"seed": -1}, "seed: -1"),
]


@pytest.mark.parametrize(
    ("kind", "change", "message"), BAD_VALUES, ids=lambda part: part.__name__ if isinstance(part, type) else str(part)
)
def test_bad_values_are_refused(kind, change, message):
    with pytest.raises(InvalidInput, match=message):
        kind(**change)


@pytest.mark.parametrize("kind", {kind for kind, _, _ in BAD_VALUES})
def test_every_option_has_a_bad_value_above(kind):
    """So that a new option is not forgotten; groups, switches and free texts have none."""
    free = {
        "problem",
        "network",
        "loss",
        "data_dir",
        "run_dir",
        "overwrite",
        "resume",
        "checkpoint_in_background",
        "view",
        "monitor",
    }
    free |= {"cuts", "relax", "recompute", "log_view", "trace", "tensorboard", "stop_on"}
    parts = {"schwarz", "local", "coarse", "trust_region", "global_step", "pipeline"}
    names = {field.name for field in dataclasses.fields(kind)} - free - parts
    tested = {name for other, change, _ in BAD_VALUES if other is kind for name in change}
    assert names <= tested, names - tested


def test_options_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        APTSOptions().seed = 3


def test_training_options_reach_the_solver():
    options = TrainingOptions(seed=3, subdomains=5, replicas=2, local=LocalOptions(solver="tr"))
    solver = options.solver_options()
    assert (solver.seed, solver.subdomains, solver.replicas, solver.local.solver) == (
        3,
        5,
        2,
        "tr",
    )
    assert solver.batch == "whole"


def composed(network=None, forward=None, subdomains=2, **changes):
    network = classifier() if network is None else network
    parts = {"local": LocalOptions(**changes.pop("local", {})), "schwarz": SchwarzOptions(**changes)}
    options = APTSOptions(subdomains=subdomains, **parts)
    layers = SegmentedNetwork(network, forward).layers(FlatParameters(network))
    split = split_parameters(options, layers, 1, may_be_dense(options, network, forward is not None))
    options = compose(
        options,
        network=network,
        loss=nn.functional.cross_entropy,
        called=forward is not None,
        layers=layers,
        subdomains=split,
    )
    return options.local.solver, options.schwarz.variant, options.schwarz.local_data


def call(network, inputs):
    return network(inputs)


def test_what_auto_stands_for():
    assert composed() == ("kfac", "inexact", "shared")
    assert composed(local={"iterations": 2}) == ("kfac", "inexact", "shard")
    assert composed(partition="index", subdomains=5) == ("adam", "inexact", "shared")
    assert composed(forward=call) == ("gauss-newton", "exact", "full")
    assert composed(classifier(width=100), forward=call) == ("kfac", "exact", "shared")  # too large for a dense matrix
    assert composed(classifier(batch_norm=True), forward=call) == ("kfac", "exact", "shared")
    assert composed(local={"solver": "sgd"}, variant="exact", local_data="full") == ("sgd", "exact", "full")


@pytest.mark.parametrize(
    ("solver", "loss", "damping"),
    [
        ("kfac", nn.functional.cross_entropy, 0.3),
        ("kfac", nn.functional.mse_loss, 0.003),
        ("gauss-newton", nn.functional.mse_loss, 1e-7),
        ("sgd", nn.functional.mse_loss, None),
    ],
)
def test_damping_by_default_is_that_of_local_solver_and_loss(solver, loss, damping):
    network = classifier()
    layers = SegmentedNetwork(network, None).layers(FlatParameters(network))
    options = APTSOptions(local=LocalOptions(solver=solver))
    split = make_subdomains(layers, 2, "layer", 0)
    composed = compose(options, network=network, loss=loss, called=False, layers=layers, subdomains=split)
    assert composed.local.damping == damping


def refuse(outputs, targets):
    raise TypeError("other targets, please")


@pytest.mark.parametrize(
    ("loss", "quadratic"),
    [
        (nn.functional.mse_loss, True),
        (nn.MSELoss(), True),
        (lambda outputs, targets: (outputs - targets).square().sum(1).mean() + outputs.mean(), True),
        (lambda outputs, targets: -(outputs - targets).square().mean(), False),
        (lambda outputs, targets: outputs.mean(), False),
        (lambda outputs, targets: (outputs - targets).cosh().log().mean(), False),
        (nn.functional.cross_entropy, False),
        (nn.functional.binary_cross_entropy_with_logits, False),
        (nn.functional.huber_loss, False),
        (nn.functional.l1_loss, False),
        (refuse, None),
        (nn.functional.nll_loss, False),
        (token_cross_entropy, False),
        (lambda outputs, targets: nn.functional.nll_loss(outputs.log_softmax(1), targets), False),
        (lambda outputs, targets: outputs["of a tree"].mean(), None),
        (weighted_squared_error, None),
    ],
)
def test_which_losses_are_quadratic(loss, quadratic):
    before = torch.get_rng_state()
    assert is_quadratic(loss) is quadratic
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward": call, "variant": "inexact"}, "schwarz.variant: 'inexact' .* choose exact"),
        ({"partition": "index", "subdomains": 5, "local": {"solver": "kfac"}}, "'kfac' needs whole layers"),
        ({"network": classifier(batch_norm=True), "local": {"solver": "gauss-newton"}}, "batch normalisation ties"),
        ({"decomposition": "data", "variant": "inexact"}, "schwarz.variant: 'inexact' .*decomposition data .* exact"),
        ({"decomposition": "data", "local_data": "full"}, "schwarz.local_data: 'full' .* choose shard"),
        ({"decomposition": "data", "overlap": 1}, "schwarz.overlap: 1 .* give 0"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        composed(**arguments)


@pytest.mark.parametrize(
    ("options", "ranks", "expected"),
    [
        (APTSOptions(), 4, 4),
        (APTSOptions(), 9, 6),
        (APTSOptions(replicas=4), 8, 2),
        (APTSOptions(subdomains=5), 1, 5),
        (APTSOptions(schwarz=SchwarzOptions(partition="index")), 9, 9),
        (APTSOptions(schwarz=SchwarzOptions(decomposition="data")), 9, 9),
    ],
)
def test_number_of_subdomains(options, ranks, expected):
    """By default one a rank of a replica, as far as the classifier's six layers go."""
    network = classifier()
    layers = SegmentedNetwork(network, None).layers(FlatParameters(network))
    assert len(split_parameters(options, layers, ranks, dense=False)) == expected


@pytest.mark.parametrize(
    ("width", "ranks", "expected"), [(16, 1, 2), (16, 3, 3), (64, 1, 20), (64, 8, 24), (512, 3, 3)]
)
def test_number_of_dense_blocks(width, ranks, expected):
    """The least multiple of the ranks with at most 640 parameters a block; of large networks, one a rank."""
    network = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])
    layers = SegmentedNetwork(network, call).layers(FlatParameters(network))
    dense = may_be_dense(APTSOptions(), network, called=True)
    parts = split_parameters(APTSOptions(), layers, ranks, dense)
    assert len(parts) == expected
    if width < 512:
        assert max(part.stop - part.start for part in parts) <= 640


def test_partition_of_dense_blocks():
    assert composed_partition() == composed_partition(classifier(batch_norm=True), forward=call) == "layer"
    wide = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 1))
    narrow = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
    assert composed_partition(wide, forward=call) == "index"
    assert composed_partition(narrow, forward=call) == "layer"
    assert composed_partition(forward=call, solver="adam") == "layer"


def composed_partition(network=None, forward=None, solver="auto"):
    network = classifier() if network is None else network
    options = APTSOptions(subdomains=3, local=LocalOptions(solver=solver))
    layers = SegmentedNetwork(network, forward).layers(FlatParameters(network))
    split = split_parameters(options, layers, 1, may_be_dense(options, network, forward is not None))
    called = forward is not None
    return compose(
        options, network=network, loss=nn.functional.cross_entropy, called=called, layers=layers, subdomains=split
    ).schwarz.partition


def test_subdomains_of_data_have_all_parameters():
    network = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    layers = SegmentedNetwork(network, None).layers(FlatParameters(network))
    parts = split_parameters(APTSOptions(subdomains=3, schwarz=SchwarzOptions(decomposition="data")), layers, 1, False)
    assert [(part.start, part.stop, part.first_segment, part.last_segment) for part in parts] == [(0, 9, 0, 2)] * 3
    assert torch.tensor([part.index for part in parts]).tolist() == [0, 1, 2]
