"""The local objectives of the subdomains, which start from the caches of the global evaluation."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from apts_mpi.curvature.products import GaussNewtonProducts, HessianProducts, Product, ProductKind
from apts_mpi.curvature.rows import GaussNewtonRows
from apts_mpi.errors import lacks_memory
from apts_mpi.network.activations import Bundle, at_point, differentiable, inner_product
from apts_mpi.network.parameters import real_flat
from apts_mpi.network.recorder import LayerRecord
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Cache, Sums
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.transport import Mirror
from apts_mpi.tools.events import BACKWARD, FORWARD
from apts_mpi.tools.trees import tensors_of


class LocalObjective:
    """The first-order consistent local objective of a subdomain (arXiv 2512.14286).

    ``f~(theta) = f_d(theta) + <R_d g - grad f_d(R_d theta_k), theta - R_d theta_k>``, with f_d as the caches have it:
    exact (to the true loss) or inexact (``<output gradient, outputs>``). Its gradient at theta_k is R_d g, whatever
    samples f_d sees. Evaluations are collective over the team.

    Parameters
    ----------
    objective
        The global objective.
    cache
        The subdomain's cache on this rank's samples.
    gradient : Tensor, shape (stop - start,)
        R_d g, the subdomain's part of the global gradient.
    team
        The ranks that share the subdomain's samples.
    weight
        This rank's share of the team's samples.
    rows : GaussNewtonRows, optional
        Those at theta_k on these samples, of this subdomain and others.

    Attributes
    ----------
    block : Tensor, shape (stop - start,)
        The subdomain's parameters, in place.
    gradient : Tensor, shape (stop - start,)
        R_d g.
    samples : int
        Number of samples of this rank.
    """

    def __init__(
        self,
        objective: Objective,
        cache: Cache,
        gradient: torch.Tensor,
        team: Communicator,
        weight: float,
        rows: GaussNewtonRows | None = None,
    ) -> None:
        subdomain = cache.subdomain
        vector = objective.vector
        self.gradient = gradient
        self.block = vector.values[subdomain.start : subdomain.stop]
        self._objective = objective
        self._cache = cache
        self._parts = cache.micro_batches or [cache]
        self._team = team
        self.weight = weight
        self.samples = sum(part.samples for part in self._parts)
        self._rows = rows
        self._at_start = self.block if rows is None else self.block.clone()
        touched = vector.touching(subdomain.start, subdomain.stop)
        self._parameters = vector.parameters[touched]
        entries = vector.entries[touched]
        # A range cut by index touches tensors that reach beyond it; their gradient accumulates there as well.
        self._accumulated = vector.gradients[entries[0].start : entries[-1].stop]
        self._inside = slice(subdomain.start - entries[0].start, subdomain.stop - entries[0].start)
        self._block_gradient = vector.gradients[subdomain.start : subdomain.stop]

    @functools.cached_property
    def records(self) -> list[LayerRecord]:
        """Calls of the recorded layers on this rank's samples."""
        return self._objective.load_records(self._cache.records)

    @property
    def sums(self) -> Sums | None:
        """In their place, of samples in micro-batches, what the local solver's ``sums`` has made of them."""
        return self._cache.sums

    def begin(self) -> None:
        """Form the first-order correction at theta_k; before the first evaluation. Collective over the team."""
        assert self._cache.gradient is not None and self._cache.value is not None
        self._start = self.block.clone()
        own, value = self._over_team(self._cache.gradient, self._cache.value)
        self.start_value = value
        self._correction = self.gradient - own

    def gradients(self, iterations: int) -> Iterator[torch.Tensor]:
        """Gradients at the block's present values, ``iterations`` times; the first is the global one, at no cost."""
        if iterations > 1:
            self.begin()
        yield self.gradient
        for _ in range(iterations - 1):
            yield self.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Local objective and gradient at the block's present values. Collective over the team.

        Returns
        -------
        value : Tensor, shape (), float64
        gradient : Tensor, shape (stop - start,)
            Valid until the next evaluation.
        """
        self._objective.vector.alias_gradients()
        self._accumulated.zero_()
        value = self._run(backward=True)
        own, value = self._over_team(self._block_gradient, value)
        return value + self._first_order(), own + self._correction

    def value(self) -> torch.Tensor:
        """Local objective at the block's present values, shape (), float64. Collective over the team."""
        with torch.no_grad():
            value = self._run(backward=False)
        if self._team.size > 1:
            _, value = self._over_team(self._block_gradient[:0], value)
        return value + self._first_order()

    def signed_gradients(self, count: int, key: int) -> list[torch.Tensor]:
        """Gradients at theta_k of f_d with a random sign for each sample. Collective over the team.

        Parameters
        ----------
        count
            How many; they share a forward pass.
        key
            What the signs are drawn with: those of a sample depend on its place among the team's.

        Returns
        -------
        list of Tensor, shape (stop - start,)
        """
        signs = self._signs(count, key)
        found = [torch.zeros_like(self._accumulated) for _ in range(count)]
        first = 0
        for cache in self._parts:
            last = first + cache.samples
            with torch.enable_grad():
                outputs = self._outputs(cache)
            slopes = self._slopes(cache, outputs)
            for total, own in zip(found, signs[:, first:last].to(self.block), strict=True):
                total += self._pulled(outputs, [_with_signs(slope, own) for slope in slopes])
            first = last
        self._count(FORWARD + count * BACKWARD)
        inside = [total[self._inside] for total in found]
        return list(self._over_team(torch.cat(inside), self.block.new_zeros(()))[0].split(len(self.block)))

    def _signs(self, count: int, key: int) -> torch.Tensor:
        """Signs of this rank's samples, shape (count, samples). Collective over the team."""
        before = sum(self._team.numbers(self.samples)[: self._team.rank]) if self._team.size > 1 else 0
        drawn = torch.randint(2, (before + self.samples, count), generator=torch.Generator().manual_seed(key))
        return 2.0 * drawn[before:].T - 1.0

    def _slopes(self, cache: Cache, outputs: Any) -> Sequence[torch.Tensor]:
        """Gradients of f_d with respect to the differentiable outputs of its last segment."""
        if cache.output_gradient is not None:
            return tensors_of(self._objective.load(cache.output_gradient))
        with torch.enable_grad():
            point, variables = at_point(outputs)
            value = self._objective.loss(point, cache.targets) * cache.share
        return torch.autograd.grad(value, variables, allow_unused=True, materialize_grads=True)

    def _pulled(self, outputs: Any, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """The outputs' derivatives by the touched parameters, transposed, times ``weights``; keeps the graph."""
        pairs = zip(differentiable(outputs), weights, strict=True)
        moving = [(tensor, weight) for tensor, weight in pairs if tensor.requires_grad]
        if not moving:
            return torch.zeros_like(self._accumulated)
        tensors, weights = zip(*moving, strict=True)
        if self._objective.knows_plain_passes_alone is not True:
            try:
                return self._derivatives(tensors, weights)
            except RuntimeError as error:  # if for another reason, it comes again
                if lacks_memory(error):
                    raise
                self._objective.knows_plain_passes_alone = True
        self._objective.vector.alias_gradients()
        self._accumulated.zero_()
        torch.autograd.backward(tensors, weights, retain_graph=True)
        return self._accumulated.clone()

    def _derivatives(self, tensors: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
        parts = torch.autograd.grad(
            tensors, self._parameters, weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        # Embeddings may give sparse ones.
        return torch.cat([real_flat(part.to_dense() if part.is_sparse else part) for part in parts])

    def gauss_newton_rows(self) -> torch.Tensor:
        """R with ``R^T R`` the Gauss-Newton matrix of this rank's samples, (samples * outputs, stop - start).

        At theta_k those of ``rows``, if given.
        """
        return self._present_rows().of(self._cache.subdomain.start, self._cache.subdomain.stop)

    def count_gauss_newton_rows(self) -> int:
        """Number of rows of the whole team's samples, without computing them."""
        return round(self._present_rows().count() / self.weight)

    def _present_rows(self) -> GaussNewtonRows:
        if self._rows is None or not torch.equal(self.block, self._at_start):
            return GaussNewtonRows(self._objective, [self._cache])
        return self._rows

    def products(self, kind: ProductKind) -> Product:
        """Products with the curvature of the local objective at the block's present values, while they stay.

        Making and calling is collective over the team. A call takes and returns a vector of shape (stop - start,).

        Parameters
        ----------
        kind
            ``hessian``, or ``gauss-newton``, which is zero for an objective that is linear in its outputs (inexact).
        """
        own = [] if self._cache.is_recomputed else [self._product_of(cache, kind) for cache in self._parts]
        if own:
            self._count(FORWARD + BACKWARD)

        def product(direction: torch.Tensor) -> torch.Tensor:
            around = torch.zeros_like(self._accumulated)
            around[self._inside] = direction
            # Of micro-batches one after the other, so that there is one graph at a time.
            products = own or (self._product_of(cache, kind) for cache in self._parts)
            curved = torch.stack([of_part(around)[self._inside] for of_part in products]).sum(dim=0)
            self._count(2.0 * BACKWARD + (0.0 if own else FORWARD + BACKWARD))
            return self._over_team(curved, curved.new_zeros(()))[0]

        return product

    def _product_of(self, cache: Cache, kind: ProductKind) -> Product:
        """`products` of a part of the samples, as a part of those of all."""
        # The fused kernels of attention have no second derivatives.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            outputs = self._outputs(cache)
            if kind == "hessian":
                return HessianProducts(self._value_of(cache, outputs), self._parameters)
            products = GaussNewtonProducts(outputs, cache.targets, self._objective.loss, self._parameters)
        return products if cache.share == 1.0 else lambda direction: products(direction) * cache.share

    def _first_order(self) -> torch.Tensor:
        return torch.dot(self._correction, self.block - self._start).double()

    def _run(self, backward: bool) -> torch.Tensor:
        values = []
        for cache in self._parts:
            value = self._value_of(cache, self._outputs(cache))
            if backward:
                self._backward(value)
            values.append(value.detach().double())
        self._count(FORWARD + BACKWARD if backward else FORWARD)
        return torch.stack(values).sum()

    def _backward(self, value: torch.Tensor) -> None:
        """Add the gradient of a value to that of the touched parameters; its graph is used up."""
        objective = self._objective
        if not objective.knows_plain_passes_alone:
            before = self._accumulated.clone() if objective.knows_plain_passes_alone is None else None
            try:
                torch.autograd.backward(value, inputs=self._parameters, retain_graph=before is not None)
                objective.knows_plain_passes_alone = False
                return
            except RuntimeError as error:  # if for another reason, it comes again
                if lacks_memory(error):
                    raise
                if before is None:
                    raise
                self._accumulated.copy_(before)
                objective.knows_plain_passes_alone = True
        torch.autograd.backward(value)

    def _outputs(self, cache: Cache) -> Bundle:
        """What the objective's last segment returns, with the masks of the global evaluation."""
        objective = self._objective
        with objective.replayed(cache.random_state):
            outputs = objective.load(cache.inputs)
            for segment in objective.segmented.segments[self._extent(cache)]:
                outputs = objective.segmented.run(segment, outputs)
        return outputs

    def _extent(self, cache: Cache) -> slice:
        """Segments of the objective: up to the loss, or where its gradient is known up to the subdomain's own last."""
        last = len(self._objective.segmented) - 1 if cache.output_gradient is None else cache.subdomain.last_segment
        return slice(cache.subdomain.first_segment, last + 1)

    def _value_of(self, cache: Cache, outputs: Bundle) -> torch.Tensor:
        if cache.output_gradient is None:
            return self._objective.loss(outputs, cache.targets) * cache.share
        return inner_product(outputs, self._objective.load(cache.output_gradient))

    def _count(self, cost: float) -> None:
        extent = self._extent(self._parts[0])
        share = self._objective.segmented.share(extent.start, extent.stop - 1)
        self._objective.events.count_work(self.samples, share, cost)

    def _over_team(self, gradient: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean over the team's samples, of a block and a scalar in one message."""
        if self._team.size == 1:
            return gradient, value
        packed = Mirror(torch.cat([gradient, value.to(gradient.dtype).reshape(1)]).mul_(self.weight))
        self._team.sum(packed)
        return packed.tensor[:-1], packed.tensor[-1].double()


def _with_signs(slope: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """The same with a sign for each sample, which may be several rows.

    Without signs where rows are not of samples: the curvature is then taken for more than it is.
    """
    rows = len(slope) // len(signs) if slope.dim() else 0
    if rows * len(signs) != slope.shape[:1].numel() or rows == 0:
        return slope
    return slope * signs.repeat_interleave(rows).view(-1, *[1] * (slope.dim() - 1))
