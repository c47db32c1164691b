"""A loss as the mean over the samples of a batch, also where the loss has a denominator of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from apts_mpi.errors import SharedInvalidInput
from apts_mpi.losses import Counted, exact, is_exact
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.parts import Parts
from apts_mpi.tools.trees import Tree, count_samples, map_tensors, take, tensors_of

# What is wrong with a loss that was taken for a mean in the first batch, by the number that the ranks agree on.
FAULTS = {
    1: (
        "loss: it is not the mean over the samples of this batch, as it was in the first (targets that are ignored?); "
        "return the pair (sum, count) of what counts, such as apts_mpi.losses.cross_entropy(ignore_index=...)"
    ),
    2: (
        "loss: it returns a pair (sum, count) for some samples and one tensor for others; return one of the two for all"
    ),
}


# Samples that are compared in two parts, at least; never single ones: a loss may use squeeze().
FEWEST = 4

# Its multiples, without whole numbers, lie evenly between 0 and 1.
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


class Term(NamedTuple):
    """What a loss returned for some samples.

    Attributes
    ----------
    value : Tensor, shape ()
        The mean over the samples, or a sum.
    count : Tensor, number or None
        What the sum is to be divided by; None for a mean.
    samples : int
        Their number.
    """

    value: torch.Tensor
    count: Any
    samples: int


class MeanLoss:
    """A loss, and the denominator of the present batch.

    Called with (outputs, targets) it returns the mean over these samples, shape (): what the loss itself returns, or,
    of a loss that returns (sum, count), the sum over ``samples * per_sample``. That is again a mean of one number a
    sample, whatever part of the batch the samples are; so all that knows of means and shares of samples holds, and
    means of parts of the batch, weighted by their samples, add up to the sum of all over the denominator of all.
    Before that is known it is the sum over the count of these samples.

    Parameters
    ----------
    loss
        Function of (outputs, targets), see `apts_mpi.APTS`.
    group
        Number of consecutive samples that belong together; None: all.

    Attributes
    ----------
    given, group
        As given.
    evaluate
        The loss, or what `apts_mpi.losses.exact` makes of it.
    is_pair : bool or None
        Whether it returns (sum, count); None until that was seen.
    is_compared : bool
        Whether a new batch is seen to have a loss that is the sum of its parts.
    per_sample : float or None
        Denominator of the present batch, of all ranks, over its number of samples; None until it is known.
    """

    def __init__(self, loss: Callable[[Any, Any], Any], group: int | None = 1) -> None:
        self.given, self.group = loss, group
        self.evaluate = exact(loss)
        self.is_pair: bool | None = True if self.evaluate is not loss else None
        self.is_compared = False
        self.per_sample: float | None = None
        self._batches = 0
        self._is_new = False
        self._has_changed = False
        self._odd: torch.Tensor | None = None

    def begin(self, targets: Sequence[Any], comm: Communicator) -> None:
        """Forget the batch before; find the denominator of the new one, if that takes no outputs. Collective.

        Parameters
        ----------
        targets
            Of this rank's passes.
        comm
            The ranks that have a loss.
        """
        self.per_sample, self._is_new, self._odd = None, True, None
        self._batches += 1
        if isinstance(self.evaluate, Counted):
            counts = [self.evaluate.count(of_pass) for of_pass in targets]
            self._agree(counts, [count_samples(of_pass) for of_pass in targets], comm)

    def begin_elsewhere(self) -> None:
        """The same on a rank that has no loss."""
        self.per_sample = None
        if isinstance(self.evaluate, Counted):
            self.close()

    def close(self) -> None:
        """Take the denominator for known, on a rank that has no loss."""
        self.per_sample = 1.0

    @property
    def is_open(self) -> bool:
        """Whether means are not known before all passes have been forward."""
        return bool(self.is_pair) and self.per_sample is None

    def __call__(self, outputs: Any, targets: Any) -> torch.Tensor:
        """The mean over some samples; before the denominator is known, by that of themselves."""
        return self.mean(self.term(outputs, targets))

    def mean(self, term: Term) -> torch.Tensor:
        """The mean over the samples of a term."""
        if term.count is None:
            return term.value
        # Where nothing counts the sum is zero, and stays so.
        count = float(term.count) if self.per_sample is None else term.samples * self.per_sample
        return term.value / (count or 1.0)

    def term(self, outputs: Any, targets: Any) -> Term:
        """What the loss returns for some samples."""
        found = self.evaluate(outputs, targets)
        samples = count_samples(targets)
        pair = isinstance(found, tuple)
        if self.is_pair is None:
            self.is_pair = pair
        if pair == self.is_pair:
            value, count = found if pair else (found, None)
            return Term(value, count, samples)
        self._has_changed = True
        return Term(found[0] / (found[1] or 1.0), None, samples) if pair else Term(found * samples, samples, samples)

    def noted(self, outputs: Any, targets: Any) -> Term:
        """`term` of a pass; of a new batch it is compared with those of two parts of the samples."""
        term = self.term(outputs, targets)
        if self._is_new and self.is_compared and not is_exact(self.evaluate) and (place := self._place(term.samples)):
            difference = self._difference(term, outputs, targets, place)
            self._odd = difference if self._odd is None else self._odd | difference
        return term

    def _place(self, samples: int) -> int:
        """Where samples are cut in two, another place for each batch, so that nothing hides behind equal parts."""
        if self.group is None or self._has_changed:
            return 0
        least = max(1, FEWEST // 2 // self.group) * self.group
        groups = (samples - 2 * least) // self.group
        return 0 if groups < 0 else least + int(GOLDEN * self._batches % 1.0 * (groups + 1)) * self.group

    @torch.no_grad()
    def _difference(self, term: Term, outputs: Any, targets: Any, place: int) -> torch.Tensor:
        """Whether the loss is finite and is not the mean, or the sum, of those before and behind ``place``."""
        parts = []
        for part in (slice(None, place), slice(place, None)):
            with torch.set_grad_enabled(term.value.requires_grad):
                parts.append(self.term(rows_of(outputs, term.samples, part), take(targets, part)))
        values = torch.stack([part.value.detach() for part in parts])
        if term.count is None:
            values = values * values.new_tensor([part.samples / term.samples for part in parts])
        epsilon = torch.finfo(term.value.dtype).eps
        leaves = [leaf.detach() for leaf in tensors_of(outputs) if leaf.numel()]
        largest = torch.stack([leaf.abs().max().to(values.dtype) for leaf in leaves if leaf.is_floating_point()]).max()
        # Terms may cancel, and a loss may be small between outputs that are large.
        scale = term.samples if term.count is not None else 1
        tolerance = epsilon**0.5 * values.abs().sum() + epsilon * scale * largest
        found = ~((term.value.detach() - values.sum()).abs() <= tolerance)
        if term.count is not None:
            whole, counts = float(term.count), sum(float(part.count) for part in parts)
            found |= abs(whole - counts) > 1e-5 * abs(whole)
        return found & term.value.isfinite()

    def settle(self, terms: Sequence[Term], comm: Communicator) -> None:
        """Find the denominator of a new batch, all of whose passes have been forward. Collective if `is_open`.

        Parameters
        ----------
        terms
            Of this rank's passes.
        comm
            The ranks that have a loss.
        """
        if self.is_open:
            self._agree([term.count for term in terms], [term.samples for term in terms], comm)
        self._is_new = False

    def _agree(self, counts: Sequence[Any], samples: Sequence[int], comm: Communicator) -> None:
        # A batch that several ranks evaluate counts as often above the line as below.
        own = Parts(sums=[sum(map(float, counts)), sum(samples)])
        (self.per_sample,) = comm.combine(own, lambda parts: [parts.sums[0] / parts.sums[1]])

    def describe(self) -> str:
        """How it is taken, in words."""
        name = getattr(self.given, "__name__", type(self.given).__name__)
        taken = "" if self.evaluate is self.given else f", as a sum and its count: {self.evaluate!r}"
        together = "" if self.group == 1 else f", of {self.group or 'all'} samples together"
        return f"{name}{taken}{together}"

    def fault(self, like: torch.Tensor) -> torch.Tensor:
        """What this rank saw, a number in ``FAULTS``, or 0 for nothing; on the device of ``like``."""
        if self._odd is not None and not self._has_changed:
            return self._odd.double()
        return torch.full_like(like, 2.0 if self._has_changed else 0.0, dtype=torch.float64)


def check_fault(fault: float) -> None:
    """Raise `SharedInvalidInput` for what a rank saw, told to all."""
    if fault:
        raise SharedInvalidInput(FAULTS[int(fault)])


def has_rows(tensor: torch.Tensor, count: int) -> bool:
    """Whether the first dimension of a tensor may be that of the samples."""
    return tensor.dim() > 0 and len(tensor) == count


def rows_of(outputs: Tree, count: int, place: slice) -> Tree:
    """The outputs of some of the samples; what does not have them in the first dimension is left as it is."""
    return map_tensors(lambda tensor: tensor[place] if has_rows(tensor, count) else tensor, outputs)
