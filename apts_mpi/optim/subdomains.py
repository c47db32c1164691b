"""The subdomains of an optimizer: one a layer, each with its local solver and what it needs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from apts_mpi.curvature.kinds import is_seldom_seen, make_curvature
from apts_mpi.curvature.signed import DRAWS, SignedFactors
from apts_mpi.local.kfac import KFAC
from apts_mpi.local.muon import NO_MATRICES, Muon
from apts_mpi.local.solver import LayerState, LocalSetting, LocalState, WholeLayer
from apts_mpi.network.recorder import LayerRecord
from apts_mpi.options import LocalOptions, TrustRegionOptions
from apts_mpi.parallel.communicator import Communicator

# Of a machine number, as a power: curvature below that share of the largest is taken for rounding.
ROUNDING = 0.75

# Share of a gradient's length below which the differences of successive ones are not the noise of batches.
LEAST_NOISE = 1e-2


class GradientObjective:
    """What a local solver is given of a layer: gradients and records, and no function to evaluate.

    In the place of gradients with random signs stand differences of the gradients of successive batches: the mean
    cancels as well, and what is left has the covariance of a batch's gradient.

    Parameters
    ----------
    gradient : Tensor, shape (size,)
        Of the mean loss of all ranks.
    records
        Calls of the layer.
    differences : sequence of Tensor, shape (size,)
        See above.
    samples
        Number of this rank's samples.
    weight
        This rank's share of all samples.

    Attributes
    ----------
    block : Tensor, shape (size,)
        The displacement.
    sums
        None: the calls are there.
    """

    sums = None

    def __init__(
        self,
        gradient: torch.Tensor,
        records: Sequence[LayerRecord],
        differences: Sequence[torch.Tensor],
        samples: int,
        weight: float,
    ) -> None:
        self.block = torch.zeros_like(gradient)
        self.gradient, self.records, self.samples, self.weight = gradient, records, samples, weight
        self._differences = differences

    def gradients(self, iterations: int) -> Iterator[torch.Tensor]:
        """The one there is."""
        yield self.gradient

    def signed_gradients(self, count: int, key: int) -> list[torch.Tensor]:
        """See the class."""
        return list(self._differences)


class LayerSubdomain:
    """The parameters of one layer, or one parameter of no known layer.

    Parameters
    ----------
    module
        The layer; None: not known.
    parameters
        Its parameters, in their order.

    Attributes
    ----------
    size : int
        Number of elements.
    cost : int
        Of its factorisation, about: the cubes of its sides.
    solver : KFAC or Muon or None
        From the first gradient on.
    is_signed : bool
        Whether it has curvature that is known from gradients alone.
    """

    def __init__(self, module: nn.Module | None, parameters: Sequence[nn.Parameter]) -> None:
        self.module = module
        self.parameters = list(parameters)
        self.size = sum(parameter.numel() for parameter in parameters)
        matrices = [(value.shape[0], value[0].numel()) for value in self.parameters if value.dim() > 1]
        self.cost = self.size + sum(rows**3 + columns**3 for rows, columns in matrices)
        self.solver: KFAC | Muon | None = None
        self.is_signed = False
        self._earlier: list[torch.Tensor] = []

    def make_solver(self, is_called: bool, options: LocalOptions, team: Communicator) -> None:
        """Have a solver if there is none, by the layer's kind where that was seen to be called."""
        if self.solver is not None:
            return
        curvature = make_curvature(self.module, self.size) if is_called and self.module is not None else None
        if curvature is None or curvature.signed:
            # By what is here: a layer may be here in part.
            curvature = SignedFactors([value.shape if value.dim() else torch.Size([1]) for value in self.parameters])
        block = self.parameters[0].detach().new_zeros(self.size)
        module = self.module if isinstance(self.module, NO_MATRICES) or options.solver == "kfac" else None
        layer = WholeLayer(curvature, module or self._as_module(), slice(0, self.size))
        setting = LocalSetting(options, TrustRegionOptions(), block, [layer], team)
        self.solver = Muon(setting) if options.solver == "muon" else KFAC(setting)
        self.is_signed = options.solver == "kfac" and curvature.signed

    def _as_module(self) -> nn.Module:
        """A layer of parameters as these are, whatever of the module is frozen or not here."""
        return nn.ParameterList(nn.Parameter(value.detach().to("meta")) for value in self.parameters)

    @property
    def is_seldom_seen(self) -> bool:
        """See `apts_mpi.curvature.kinds.is_seldom_seen`, of what is trained."""
        size = sum(value.numel() for value in self.parameters if value.requires_grad)
        return size > 0 and (self.module is None or is_seldom_seen(self.module, size))

    @property
    def wants_records(self) -> bool:
        """Whether the next step needs the calls of the layer."""
        trained = any(value.requires_grad for value in self.parameters)
        return trained and (self.solver is None or (self.solver.observes and not self.is_signed))

    def direction(
        self, gradient: torch.Tensor, records: Sequence[LayerRecord], samples: int, weight: float, is_own: bool
    ) -> torch.Tensor:
        """The local solver's direction along the running mean of the gradients, shape (size,). Collective.

        Zero unless it is this rank's own: then the rank moves its running means alone, and factorises nothing.
        """
        assert self.solver is not None
        differences: list[torch.Tensor] = []
        if self.is_signed:
            self._earlier = [*self._earlier, gradient.clone()][-DRAWS - 1 :]
            differences = _differences(self._earlier) if self.solver.observes else []
        local = GradientObjective(gradient, records, differences, samples, weight)
        # One gradient says nothing about its noise.
        if not self.is_signed or len(self._earlier) > 1:
            if is_own:
                local.block.copy_(self.solver.unbounded(local))  # type: ignore[arg-type]
            else:
                self.solver.follow(local)  # type: ignore[arg-type]
        return local.block

    def state(self) -> dict[str, Any]:
        """What lasts, in numbers, tensors and lists of them; empty before the first gradient."""
        if self.solver is None:
            return {}
        kept = self.solver.state()
        layers = [layer.tensors for layer in kept.layers]
        return {
            **kept.numbers,
            "momentum": kept.vectors.get("momentum"),
            "squares": kept.vectors.get("squares"),
            "signed": self.is_signed,
            "factors": layers[0] if layers else [],
            "earlier": self._earlier,
        }

    def restore(self, state: dict[str, Any], options: LocalOptions, team: Communicator) -> None:
        """Take over what `state` has returned."""
        self.solver, self._earlier = None, []
        if not state:
            return
        vectors = {name: state[name] for name in ("momentum", "squares") if state.get(name) is not None}
        self.make_solver(not state["signed"], options, team)
        assert self.solver is not None
        # Copies, as running means move in place. Of no kind by name: the curvature is there already.
        layers = [LayerState("", [tensor.clone() for tensor in state["factors"]])] if state["factors"] else []
        numbers = {name: state[name] for name in ("count", "updates") if name in state}
        self.solver.restore(LocalState(numbers, vectors, layers))
        self._earlier = [gradient.clone() for gradient in state["earlier"]]


def _differences(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of successive gradients, as noise of the last one; or that itself where there is no noise to speak of."""
    found = [(after - before) * 0.5**0.5 for before, after in itertools.pairwise(gradients)]
    lengths = [*(torch.linalg.vector_norm(one) for one in found), torch.linalg.vector_norm(gradients[-1])]
    *noise, length = torch.stack(lengths).tolist()
    return found if found and max(noise) > LEAST_NOISE * length else [gradients[-1]]


def find_subdomains(network: nn.Module | None, parameters: Sequence[nn.Parameter]) -> list[LayerSubdomain]:
    """Subdomains of some parameters: the layers of a network in its order, and each other parameter by itself."""
    left = {id(parameter): parameter for parameter in parameters if parameter.numel()}
    found = []
    for module in [] if network is None else network.modules():
        own = [left.pop(id(value)) for value in module.parameters(recurse=False) if id(value) in left]
        if own:
            found.append(LayerSubdomain(module, own))
    return found + [LayerSubdomain(None, [parameter]) for parameter in left.values()]


def owners_of(costs: Sequence[int], ranks: int, before: Sequence[int] = ()) -> list[int]:
    """The rank that factorises each subdomain, the one with least to do so far; those ``before`` keep theirs."""
    loads, owners = [0] * ranks, list(before)
    for number, cost in enumerate(costs):
        if number == len(owners):
            owners.append(loads.index(min(loads)))
        loads[owners[number]] += cost
    return owners


def shares_of_rounding(directions: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> list[float]:
    """Factors that shorten the directions of subdomains that the loss does not depend on but by rounding.

    Such as a bias before batch normalisation: gradient and noise are tiny alike, and the inverse of the one times the
    other is long. The curvature that a direction reckons with, ``|gradient| / |direction|``, has to be more than
    rounding beside that of other subdomains.
    """
    slopes, lengths = (torch.stack(torch._foreach_norm(list(vectors))) for vectors in (gradients, directions))
    curvatures = (slopes / lengths).nan_to_num(nan=0.0, posinf=0.0)
    least = torch.finfo(slopes.dtype).eps ** ROUNDING * curvatures.max()
    scales = (curvatures / least).nan_to_num(nan=1.0, posinf=1.0).clamp(max=1.0)
    return torch.where(slopes > 0.0, scales, torch.ones_like(scales)).tolist()
