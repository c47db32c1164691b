"""Rows of the dense Gauss-Newton matrix of a block, for small blocks or small batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.func import functional_call, jacrev, vjp, vmap

from apts_mpi.curvature.loss_curvature import WITHOUT_ROWS, AtOutputs, at_outputs, read_outputs, side_by_side
from apts_mpi.errors import named_failures
from apts_mpi.network.activations import Bundle, differentiable, with_differentiable, with_tensors
from apts_mpi.objective.passes import Mean, Returned
from apts_mpi.tools.environment import random_state, set_random_state
from apts_mpi.tools.events import BACKWARD, FORWARD
from apts_mpi.tools.trees import Tree, count_samples, map_tensors, tensors_of

# A dense matrix of this size takes 128 MB and a few seconds to factorise.
LARGEST_DENSE = 4096

# The derivatives of more samples at once would take several times the memory of the result.
SAMPLES_AT_ONCE = 1024

# The same where every one of these takes the memory of a backward pass of all samples.
OUTPUTS_AT_ONCE = 32


class BlockJacobian:
    """Derivatives of every sample's outputs with respect to the parameters of a block.

    By ``torch.func``, all samples at once; for a network that this cannot differentiate sample by sample
    (``torch.autograd.grad`` within, random numbers that samples share) by a backward pass of the batch for each output.

    Parameters
    ----------
    segments
        The segments from the block's first to the network's last.
    parameters
        The tensors that hold the block, in the order of the flat vector; neighbours there.
    loss
        The loss.

    Attributes
    ----------
    cost : float
        Of the last rows, in units of `apts_mpi.tools.events`, for all samples.
    at_outputs : AtOutputs
        The loss around the outputs, of the last rows.
    """

    cost = 0.0
    at_outputs: AtOutputs

    def __init__(self, segments: Sequence[nn.Module], parameters: Sequence[torch.Tensor], loss: Mean) -> None:
        self._chain = nn.Sequential(*segments)
        names = {id(value): name for name, value in self._chain.named_parameters()}
        self._names = [names[id(value)] for value in parameters]
        self._parameters = parameters
        self._loss = loss

    def rows(self, inputs: Bundle, targets: Tree, returned: Returned | None = None) -> torch.Tensor:
        """R with ``R^T R = J^T H J``, the Gauss-Newton matrix of the mean loss; shape (samples * outputs, size).

        The outputs of a sample are those of all tensors that the loss reads. A tensor without samples in its first
        dimension, such as an auxiliary loss that is added, has no curvature.

        Parameters
        ----------
        inputs, targets : tree of Tensor
            What enters the first segment, and the targets. Random masks are those of torch's random state.
        returned
            By the network, for these inputs at these parameters and with these masks, where that is known.
        """
        device = tensors_of(inputs)[0].device
        with torch.no_grad():
            before = random_state(device)
            if returned is None:
                outputs = self._chain(inputs)
                returned = Returned(outputs, not torch.equal(before, random_state(device)))
            outputs, random = returned
            places = read_outputs(self._loss, outputs, targets)
            if not places:
                size, samples = sum(parameter.numel() for parameter in self._parameters), count_samples(targets)
                nothing = self._parameters[0].new_zeros(samples, 1)
                self.at_outputs = AtOutputs(places, nothing, nothing[:, :, None], nothing, True)
                return nothing.new_zeros(samples, size)
            set_random_state(before, device)
            jacobian = self._of_samples(inputs, side_by_side(outputs, places), places, random)
            if jacobian is None:
                set_random_state(before, device)
                jacobian = self._of_outputs(inputs, places)
        self.at_outputs = at_outputs(self._loss, outputs, targets, places)
        return (self.at_outputs.roots @ jacobian).flatten(0, 1)

    def _of_samples(
        self, inputs: Bundle, outputs: torch.Tensor, places: Sequence[int], random: bool
    ) -> torch.Tensor | None:
        """Derivatives of the outputs, shape (samples, outputs, size), sample by sample; None where that fails."""
        values = {name: value.detach() for name, value in zip(self._names, self._parameters, strict=True)}
        given = tensors_of(inputs)

        def outputs_of_sample(
            values: dict[str, torch.Tensor], *sample: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            batch = with_tensors(inputs, [tensor[None] for tensor in sample])
            outputs = side_by_side(functional_call(self._chain, values, (batch,)), places).flatten()
            return outputs, outputs

        # All samples at once draw the masks that the batch draws, chunks of them would not.
        chunk = None if random else SAMPLES_AT_ONCE
        of_samples = vmap(
            jacrev(outputs_of_sample, has_aux=True),
            in_dims=(None, *[0] * len(given)),
            randomness="different",
            chunk_size=chunk,
        )
        try:
            derivatives, own = of_samples(values, *given)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError):  # if for another reason, it comes again
            return None
        if random and outputs.isfinite().all() and not _is_close(own, outputs):
            return None
        self.cost = FORWARD + BACKWARD
        return _joined(derivatives, self._names)

    def _of_outputs(self, inputs: Bundle, places: Sequence[int]) -> torch.Tensor:
        """The same, output by output."""
        with torch.enable_grad():
            outputs = side_by_side(self._chain(inputs), places)
            values = outputs.flatten()
        rows = []
        for numbers in torch.arange(len(values), device=values.device).split(OUTPUTS_AT_ONCE):
            units = nn.functional.one_hot(numbers, len(values)).to(values.dtype)
            try:
                parts = torch.autograd.grad(
                    values,
                    self._parameters,
                    units,
                    is_grads_batched=True,
                    retain_graph=True,
                    allow_unused=True,
                )
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError):  # if for another reason, it comes again
                with named_failures(*WITHOUT_ROWS), torch.enable_grad():
                    rows = [self._by_plain_pass(value) for value in values]
                break
            rows.append(_side_by_side(parts, self._parameters, len(units)))
        self.cost = FORWARD + len(values) * BACKWARD
        return torch.cat(rows).unflatten(0, (len(outputs), -1))

    def _by_plain_pass(self, value: torch.Tensor) -> torch.Tensor:
        """Derivatives of one number, shape (1, size), by what reentrant checkpoints know alone."""
        kept = [parameter.grad for parameter in self._parameters]
        try:
            for parameter in self._parameters:
                parameter.grad = None
            torch.autograd.backward(value, retain_graph=True)
            return _side_by_side([parameter.grad for parameter in self._parameters], self._parameters, 1)
        finally:
            for parameter, gradient in zip(self._parameters, kept, strict=True):
                parameter.grad = gradient


def _joined(derivatives: dict[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    """Derivatives by several parameters of any shapes side by side, shape (samples, k, size)."""
    return torch.cat([derivatives[name].reshape(*derivatives[name].shape[:2], -1) for name in names], dim=2)


def _side_by_side(parts: Sequence[torch.Tensor | None], parameters: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """Derivatives of ``count`` numbers by each parameter side by side, shape (count, size); None stands for zeros."""
    return torch.cat(
        [
            parameter.new_zeros(count, parameter.numel()) if part is None else part.reshape(count, -1)
            for part, parameter in zip(parts, parameters, strict=True)
        ],
        dim=1,
    )


def _is_close(own: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether two results of the same operations differ by no more than rounding."""
    tolerance = torch.finfo(own.dtype).eps ** 0.5
    return bool((own - others).abs().max() <= tolerance * others.abs().max())


def gram(rows: torch.Tensor) -> torch.Tensor:
    """``R^T R`` of rows of shape (count, size), float32 or float64; shape (size, size)."""
    if rows.device.type != "cpu":
        return rows.T @ rows
    # numpy sees that the result is symmetric and computes half of it (BLAS syrk), which torch does not.
    values = rows.numpy()
    return torch.from_numpy(values.T @ values)


def uses_rows(count: int, size: int) -> bool:
    """Whether ``count`` rows of ``size`` numbers are so few that `of_rows` costs less than ``R^T R`` itself."""
    # Up to half as many it is faster, and with as many it takes two and a half times as long.
    return 2 * count < size or size > LARGEST_DENSE


def of_rows(rows: torch.Tensor, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and a slope in an orthonormal basis of their own span.

    ``(R^T R + mu I)^-1 slope`` lies there, whether or not the slope is a combination of the rows: across the rows
    ``R^T R`` is zero.

    Parameters
    ----------
    rows : Tensor, shape (count, size), float64
        Fewer than ``size``.
    slope : Tensor, shape (size,), float64

    Returns
    -------
    basis : Tensor, shape (size, count + 1)
    rows : Tensor, shape (count, count + 1)
        ``R basis``.
    slope : Tensor, shape (count + 1,)
        ``basis^T slope``.
    """
    basis, triangle = torch.linalg.qr(torch.cat([rows, slope[None]]).T)
    return basis, triangle[:, :-1].T, triangle[:, -1].contiguous()


def pull_rows(
    segments: Sequence[nn.Module],
    parameters: Sequence[torch.Tensor],
    inputs: Bundle,
    rows: Sequence[torch.Tensor],
    places: Sequence[int] | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Take rows of derivatives back through segments: from those by their outputs to those by what is before.

    Parameters
    ----------
    segments, parameters
        As in `BlockJacobian`; the segments may be followed by others.
    inputs
        What enters the first segment.
    rows
        For each differentiable tensor that leaves the last segment, or for those in some ``places``, the derivatives
        of k numbers a sample by it, shape (k, samples, ...).

    Returns
    -------
    by_parameters : Tensor, shape (samples * k, size)
    by_inputs : tuple of Tensor
        For each differentiable tensor that enters, shape (k, samples, ...).
    """
    chain = nn.Sequential(*segments)
    found = {id(value): name for name, value in chain.named_parameters()}
    names = [found[id(value)] for value in parameters]
    values = {name: value.detach() for name, value in zip(names, parameters, strict=True)}

    given = tensors_of(inputs)

    def of_sample(*of_one: torch.Tensor) -> tuple:
        sample, rows = with_tensors(inputs, of_one[: len(given)]), of_one[len(given) :]

        def outputs(values: dict[str, torch.Tensor], *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
            batch = map_tensors(lambda tensor: tensor[None], with_differentiable(sample, parts))
            leaving = differentiable(functional_call(chain, values, (batch,)))
            chosen = leaving if places is None else [leaving[place] for place in places]
            return tuple(tensor[0] for tensor in chosen)

        pull: Callable[..., tuple] = vjp(outputs, values, *differentiable(sample))[1]
        return vmap(lambda *of_row: pull(of_row))(*rows)

    in_dims = (*[0] * len(given), *[1] * len(rows))
    with named_failures(*WITHOUT_ROWS):
        derivatives, *by_inputs = vmap(of_sample, in_dims=in_dims, chunk_size=SAMPLES_AT_ONCE)(*given, *rows)
    return _joined(derivatives, names).flatten(0, 1), tuple(part.transpose(0, 1) for part in by_inputs)
