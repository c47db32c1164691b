"""The optimizers that APTS is set beside, one table: how each is made, its schedule, and what it keeps.

All settings but the step size and its schedule are the documented defaults, and SGD has momentum 0.9.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW
from torch.optim.lbfgs import LBFGS

from apts_mpi.errors import InvalidInput
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.tools.schema import nothing_or, number, record, whole
from apts_mpi.train.optimizer_states import (
    Kept,
    OfGroups,
    OfSoap,
    OfVector,
    of_lbfgs,
    of_muon,
    of_shape,
    of_soap,
)
from apts_mpi.train.peers import classes
from apts_mpi.train.schedules import Schedule, constant, cosine, warm_up, warm_up_and_cosine

# Step size of Muon's AdamW as a share of that of its matrices: both at their defaults, or both as much larger.
ADAMW_SHARE = 3e-4 / 2e-2


@dataclass(frozen=True)
class Weights:
    """The parameters of a network, as optimizers may want them; all have their gradients.

    Attributes
    ----------
    vector : Parameter, shape (n,)
        All in one.
    tensors : sequence of Parameter
        The same memory in the shapes that they have in the network.
    hidden : sequence of bool
        Which of them are hidden matrices.
    """

    vector: torch.nn.Parameter
    tensors: Sequence[torch.nn.Parameter]
    hidden: Sequence[bool]


def weights_of(flat: FlatParameters, gradient: torch.Tensor) -> Weights:
    """The parameters of a network, with their gradients in ``gradient``."""

    def parameter(values: torch.Tensor, own: torch.Tensor) -> torch.nn.Parameter:
        found = torch.nn.Parameter(values)
        found.grad = own
        return found

    shapes = [
        (slice(entry.start, entry.stop), own.shape) for entry, own in zip(flat.entries, flat.parameters, strict=True)
    ]
    tensors = [parameter(flat.values[place].view(shape), gradient[place].view(shape)) for place, shape in shapes]
    return Weights(parameter(flat.values, gradient), tensors, hidden_matrices(flat))


def hidden_matrices(flat: FlatParameters) -> list[bool]:
    """Which parameters are weights of more than one dimension, without embeddings and the last layer's."""
    embeddings = [module.weight for module in flat.network.modules() if isinstance(module, torch.nn.Embedding)]
    found = [own.dim() > 1 and all(own is not other for other in embeddings) for own in flat.parameters]
    if any(found):
        found[max(index for index, is_matrix in enumerate(found) if is_matrix)] = False
    return found


@dataclass(frozen=True)
class Kind:
    """An optimizer of the table.

    Attributes
    ----------
    make
        Makes it, of the parameters and the largest step size.
    kept
        What it keeps.
    schedule
        Of its step sizes.
    averages
        Whether the network is to be evaluated elsewhere than where it is trained: at the point to which ``eval()`` of
        the optimizer leads.
    """

    make: Callable[[Weights, float], torch.optim.Optimizer]
    kept: Kept
    schedule: Schedule = constant
    averages: bool = False


def _muon(weights: Weights, rate: float) -> Any:
    hidden, others = (
        [own for own, is_one in zip(weights.tensors, weights.hidden, strict=True) if is_one is wanted]
        for wanted in (True, False)
    )
    if not hidden:
        raise InvalidInput("optimizer: 'muon' needs a hidden matrix, and the network has none; choose another")
    groups = [
        {"params": hidden, "lr": rate, "use_muon": True},
        {"params": others, "lr": ADAMW_SHARE * rate, "use_muon": False},
    ]
    return classes().Muon(groups)


_ADAM = OfVector(lambda vector, scalar: record({"step": scalar, "exp_avg": vector, "exp_avg_sq": vector}))

_STEPS = {"step": whole()}

OPTIMIZERS: dict[str, Kind] = {
    "adam": Kind(lambda weights, rate: Adam([weights.vector], lr=rate), _ADAM),
    "sgd": Kind(
        lambda weights, rate: SGD([weights.vector], lr=rate, momentum=0.9),
        OfVector(lambda vector, scalar: record({"momentum_buffer": nothing_or(vector)})),
    ),
    "lbfgs": Kind(
        lambda weights, rate: LBFGS([weights.vector], lr=rate, max_iter=10, line_search_fn="strong_wolfe"),
        OfVector(of_lbfgs),
    ),
    "adamw-cosine": Kind(lambda weights, rate: AdamW([weights.vector], lr=rate), _ADAM, warm_up_and_cosine),
    "schedule-free": Kind(
        lambda weights, rate: classes().ScheduleFreeAdamW([weights.vector], lr=rate),
        OfGroups(
            of_shape("z", "exp_avg_sq"),
            {"weight_sum": number(0.0), "lr_max": number()},
            lambda arrays: _STEPS,
        ),
        warm_up,
        averages=True,
    ),
    "muon": Kind(_muon, OfGroups(of_muon, {}, lambda arrays: _STEPS), warm_up_and_cosine),
    "soap": Kind(
        lambda weights, rate: classes().SOAP(weights.tensors, lr=rate),
        OfSoap(of_soap, {}, lambda arrays: _STEPS),
        warm_up_and_cosine,
    ),
    "prodigy": Kind(
        lambda weights, rate: classes().Prodigy([weights.vector], lr=rate),
        OfGroups(
            of_shape("s", "p0", "exp_avg", "exp_avg_sq"),
            {**_STEPS, "d": number(0.0), "d_max": number(0.0)},
            lambda arrays: {"d_numerator": arrays.free((1,))},
        ),
        # Without a warm-up, as its authors advise: its estimate of the distance is one.
        cosine,
    ),
}
