"""Sums and counts of losses: parts of any sizes add up to torch's own mean over all samples, in value and gradient."""

import functools
import itertools
import pickle

import pytest
import torch
from torch import nn

from apts_mpi import InvalidInput, losses

F = nn.functional
SAMPLES, CLASSES = 23, 5
# Some hundred additions of numbers of order one, in float64.
TOLERANCE = 1e-14


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape, ignored=None):
    found = torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(5))
    if ignored is not None:
        found[:7] = ignored
        found[9::4] = ignored
    return found


def chances(*shape):
    return drawn(*shape, seed=3).softmax(dim=1)


WEIGHT = drawn(CLASSES, seed=7).exp()
OF_ANSWERS = drawn(3, seed=8).exp()
OPTIONS = [
    {},
    {"weight": WEIGHT},
    {"label_smoothing": 0.1},
    {"weight": WEIGHT, "label_smoothing": 0.3},
]
IGNORING = [{**chosen, "ignore_index": ignored} for chosen in OPTIONS for ignored in (-100, 2, 255)]

# Loss, torch's mean, outputs, targets.
CASES = [
    *[
        (
            losses.cross_entropy(**chosen),
            functools.partial(F.cross_entropy, **chosen),
            drawn(SAMPLES, CLASSES, *more),
            to,
        )
        for chosen in IGNORING
        for more in ((), (4,), (3, 2))
        for to in [classes(SAMPLES, *more, ignored=chosen["ignore_index"])]
    ],
    *[
        (
            losses.cross_entropy(**chosen),
            functools.partial(F.cross_entropy, **chosen),
            drawn(SAMPLES, CLASSES, *more),
            to,
        )
        for chosen in OPTIONS
        for more in ((), (4,), (3, 2))
        for to in [chances(SAMPLES, CLASSES, *more)]
    ],
    *[
        (
            losses.binary_cross_entropy_with_logits(**chosen),
            functools.partial(F.binary_cross_entropy_with_logits, **chosen),
            drawn(SAMPLES, 3),
            chances(SAMPLES, 3),
        )
        for chosen in (
            {},
            {"weight": OF_ANSWERS},
            {"pos_weight": OF_ANSWERS},
            {"weight": OF_ANSWERS, "pos_weight": WEIGHT[:3]},
        )
    ],
    (losses.mse(), F.mse_loss, drawn(SAMPLES, 3, 2), drawn(SAMPLES, 3, 2, seed=1)),
    (losses.l1(), F.l1_loss, drawn(SAMPLES, 3), drawn(SAMPLES, 3, seed=1)),
    (losses.huber(), F.huber_loss, drawn(SAMPLES), drawn(SAMPLES, seed=1)),
    (losses.huber(delta=0.3), functools.partial(F.huber_loss, delta=0.3), drawn(SAMPLES, 3), drawn(SAMPLES, 3, seed=1)),
]


@pytest.mark.parametrize("edges", [(0, 23), (0, 5, 23), (0, 7, 8, 20, 23)], ids=len)
@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case[0])[:60])
def test_parts_add_up_to_torchs_mean(case, edges):
    loss, mean, outputs, targets = case
    outputs = outputs.clone().requires_grad_()
    total, count = 0.0, 0.0
    for start, stop in itertools.pairwise(edges):
        part, denominator = loss(outputs[start:stop], targets[start:stop])
        assert float(denominator) == pytest.approx(float(loss.count(targets[start:stop])), rel=1e-15)
        assert part.isfinite()
        total, count = total + part, count + float(denominator)
    found, expected = total / count, mean(outputs, targets)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    slopes = [torch.autograd.grad(value, outputs, retain_graph=True)[0] for value in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("loss", {repr(case[0]): case[0] for case in CASES}.values(), ids=repr)
def test_they_are_values(loss):
    """That other processes can have, and that say what they are."""
    again = pickle.loads(pickle.dumps(loss))
    assert repr(again) == repr(loss) and type(loss).__name__ in repr(loss)


EXACT = [
    (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=2, label_smoothing=0.1), (2, 0.1)),
    (functools.partial(F.cross_entropy, ignore_index=2, weight=WEIGHT), (2, 0.0)),
    (F.cross_entropy, (-100, 0.0)),
    (nn.NLLLoss(ignore_index=3), (3, None)),
    (functools.partial(F.nll_loss, ignore_index=3), (3, None)),
    (F.nll_loss, (-100, None)),
]


@pytest.mark.parametrize(("loss", "found"), EXACT, ids=lambda part: str(part)[:40])
def test_losses_of_torch_that_are_recognised(loss, found):
    exact = losses.exact(loss)
    assert (exact.ignore_index, getattr(exact, "label_smoothing", None)) == found
    targets = classes(SAMPLES, ignored=found[0])
    outputs = drawn(SAMPLES, CLASSES)
    total, count = exact(outputs, targets)
    torch.testing.assert_close(total / count, loss(outputs, targets), rtol=TOLERANCE, atol=TOLERANCE)


class Other(nn.CrossEntropyLoss):
    """May do anything."""


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        nn.NLLLoss(reduction="none"),
        functools.partial(F.cross_entropy, reduction="sum"),
        functools.partial(F.cross_entropy, size_average=False),
        functools.partial(F.mse_loss),
        Other(),
        lambda outputs, targets: F.cross_entropy(outputs, targets),
    ],
)
def test_others_are_left_alone(loss):
    assert losses.exact(loss) is loss


@pytest.mark.parametrize("loss", [losses.mse(), losses.huber(), losses.l1(), losses.binary_cross_entropy_with_logits()])
def test_shapes_have_to_be_the_same(loss):
    with pytest.raises(InvalidInput, match=r"outputs of shape \(23, 1\) and targets of shape \(23,\)"):
        loss(drawn(SAMPLES, 1), drawn(SAMPLES))


def test_settings_that_are_refused():
    with pytest.raises(InvalidInput, match="label_smoothing: 1.5 .* give a number from 0 to 1"):
        losses.cross_entropy(label_smoothing=1.5)
    with pytest.raises(InvalidInput, match="delta: 0.0 .* above 0"):
        losses.huber(delta=0.0)
