"""Options that would do nothing are refused; those of a run that goes on are not."""

import dataclasses

import pytest

from apts_mpi.errors import InvalidInput
from apts_mpi.train.options import TrainingOptions
from apts_mpi.train.parser import parse
from apts_mpi.train.unused import check_unused


def options_of(line):
    return parse(line.split())[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--cuts=a", "pipeline.cuts: 'a' is not allowed; it is for layout staged"),
        ("--schedule=gpipe", "pipeline.schedule: 'gpipe'"),
        ("--patience=5", "patience: 5 is not allowed; it is for --stop-on"),
        ("--global-step=lsr1 --global-step.krylov-products=5", "global_step.krylov_products: 5"),
        ("--global-step=none --global-step.iterations=2", "there is no global step with --global-step none"),
        ("--local.product=hessian", "local.product: 'hessian' is not allowed; it is for --local.solver steihaug"),
        ("--local.solver=muon --local.damping=3", "it is for --local.solver kfac and gauss-newton"),
        (
            "--local.solver=gauss-newton --local.refresh=3",
            "local.refresh: 3 is not allowed; it is for --local.solver kfac",
        ),
        ("--local.solver=adam --local.momentum=0.5", "it is for --local.solver kfac and muon"),
        ("--coarse=residual --coarse.largest=4", "coarse.largest: 4 is not allowed; --coarse residual has no columns"),
        ("--coarse=none --coarse.damping=0.2", "there is no coarse level with --coarse none"),
        (
            "--coarse=gauss-newton --coarse.momentum=0.2",
            "coarse.momentum: 0.2 is not allowed; it is for --coarse",
        ),
        ("--trust-region.metric-radius=1", "trust_region.metric_radius: 1.0 is not allowed"),
    ],
)
def test_what_would_do_nothing_is_refused(line, words):
    options = options_of(line)
    with pytest.raises(InvalidInput) as refused:
        check_unused(options, options)
    assert words in str(refused.value)
    # As a run may have them that goes on in another way.
    assert check_unused(TrainingOptions(), options) == []


@pytest.mark.parametrize(
    "line",
    [
        *("", "--layout=staged --cuts=a --schedule=gpipe", "--optimizer=adam --learning-rate=0.1"),
        *("--stop-on=test_loss --patience=5", "--local.solver=steihaug --local.product=hessian"),
        *("--local.solver=own:Solver --local.krylov-products=3", "--coarse=residual --coarse.momentum=0.2"),
        *("--local.solver=muon --local.momentum=0.5", "--local.damping=0.5 --local.refresh=3", "--coarse.largest=4"),
        *(f"--method={name}" for name in ("apts", "iapts", "apts-data", "napts")),
    ],
)
def test_what_is_used_is_not(line):
    options = options_of(line)
    assert check_unused(options, options) == []


def test_an_option_of_the_call_may_be_for_a_run_that_goes_on():
    given = options_of("--learning-rate=0.1")
    assert check_unused(given, dataclasses.replace(given, optimizer="adam")) == []


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("--optimizer=adam --local.decay=0.5", "local.decay: it is for optimizer apts, and does nothing here"),
        ("--optimizer=sgd --coarse=none", "coarse.model: it is for optimizer apts, and does nothing here"),
        ("--learning-rate=0.1", "learning_rate: optimizer apts has no learning rate, and it does nothing here"),
    ],
)
def test_what_is_for_another_optimizer_is_told(line, note):
    options = options_of(line)
    assert check_unused(options, options) == [note]
