"""What judged steps say of a function that stays the same."""

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from apts_mpi import TrustRegionOptions
from apts_mpi.trust_region.acceptance import judge
from apts_mpi.trust_region.same_function import (
    LARGEST,
    LARGEST_FORCING,
    LEAST_DAMPING,
    NEW,
    PATIENCE,
    SMALLEST,
    USUAL,
    SameFunction,
)


def judged(actual=1.0, predicted=1.0, norm=1.0, noise=0.0, loss=1.0):
    numbers = {"radius": 1.0, "loss": loss, "trial_loss": loss - actual, "predicted_reduction": predicted}
    return replace(judge(TrustRegionOptions(), **numbers, step_norm=1.0, noise=noise), gradient_norm=norm)


def staying():
    return NEW.judged(judged()).again()


def test_it_is_known_to_stay_after_an_accepted_step_alone():
    """A batch that is tried again after a rejection is no sign of a full one."""
    assert not NEW.again().stays
    assert not NEW.judged(judged(actual=-1.0)).again().stays
    assert staying().stays


def test_nothing_moves_on_a_new_function():
    for actual in (1.0, -1.0):
        after = NEW.relaxed(judged(actual)).judged(judged(actual))
        assert after.damping == 1.0 and after.krylov(None, None) == USUAL and not after.converged
    assert NEW.damped(0.1) == 0.1


@given(ratios=st.lists(st.floats(-2.0, 2.0), max_size=60), damping=st.floats(1e-12, 10.0))
def test_damping_follows_the_ratio_within_bounds(ratios, damping):
    same = staying()
    for ratio in ratios:
        before, same = same.damping, same.relaxed(judged(actual=ratio))
        if ratio < 0.25:
            assert same.damping == min(4.0 * before, LARGEST)
        elif ratio > 0.75:
            assert same.damping == max(0.25 * before, SMALLEST)
        else:
            assert same.damping == before
        assert same.damped(damping) >= min(damping, LEAST_DAMPING)


def test_it_goes_down_to_its_bound_and_up_again():
    same = staying()
    for _ in range(30):
        same = same.relaxed(judged())
    assert same.damped(0.1) == LEAST_DAMPING
    for _ in range(30):
        same = same.relaxed(judged(actual=-1.0))
    assert same.damping == LARGEST


@given(actual=st.floats(-1.0, 1.0), predicted=st.floats(0.0, 10.0))
def test_what_the_loss_cannot_show_moves_no_damping(actual, predicted):
    same = staying()
    assert same.relaxed(judged(actual, predicted, noise=1.0)) == same


@given(norms=st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=20))
def test_forcing_is_bounded_and_follows_the_gradient(norms):
    same = staying()
    for norm in norms:
        before, same = same, same.judged(judged(norm=norm))
        assert 0.0 <= same.forcing <= LARGEST_FORCING
        if 0.9 * before.forcing**2 <= 0.1:
            assert math.isclose(same.forcing, min(0.9 * (norm / before.gradient_norm) ** 2, LARGEST_FORCING))


def test_limits_that_are_asked_for_hold():
    for same in (NEW, staying()):
        limits = same.krylov(1e-3, 7)
        assert (limits.tolerance, limits.products) == (1e-3, 7)


def test_it_has_converged_when_neither_loss_nor_gradient_falls():
    same = staying()
    for norm in (1e-3, 1e-6, 1e-9):  # the loss cannot show it, but the gradient falls
        same = same.judged(judged(norm=norm, noise=1.0))
        assert same.waited == 0
    for count in range(PATIENCE):
        assert not same.converged
        same = same.judged(judged(norm=0.9e-9, noise=1.0))
        assert same.waited == count + 1
    assert same.converged
    assert not same.judged(judged(norm=1e-9)).converged  # a step that the loss can show


def test_a_global_step_that_does_not_pay_has_longer_and_longer_pauses():
    same, pauses = SameFunction(stays=True, accepted=True), []
    for _ in range(6):
        same = same.weighed(judged(actual=1.0), judged(actual=0.1), products=10)
        pause = -1
        while True:
            same, pause = same.again(), pause + 1
            if not same.pause:
                break
        pauses.append(pause)
    assert pauses == [1, 2, 4, 8, 8, 8]
    assert same.weighed(judged(actual=1.0), judged(actual=2.0), products=10).paused == 0
