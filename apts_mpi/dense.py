"""Rows of the dense Gauss-Newton matrix of a block, for small blocks on small batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.func import functional_call, jacrev, vjp, vmap

from apts_mpi.bundle import Bundle, differentiable, map_tensors, with_differentiable
from apts_mpi.objective import Loss

# The derivatives of more samples at once would take several times the memory of the result.
SAMPLES_AT_ONCE = 1024


class BlockJacobian:
    """Derivatives of every sample's outputs with respect to the parameters of a block.

    Parameters
    ----------
    segments
        The segments from the block's first to the network's last.
    parameters
        The tensors that hold the block, in the order of the flat vector; neighbours there.
    loss
        The loss.
    """

    def __init__(self, segments: Sequence[nn.Module], parameters: Sequence[torch.Tensor], loss: Loss) -> None:
        self._chain = nn.Sequential(*segments)
        names = {id(value): name for name, value in self._chain.named_parameters()}
        self._names = [names[id(value)] for value in parameters]
        self._parameters = parameters
        self._loss = loss

    def rows(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """R with ``R^T R = J^T H J``, the Gauss-Newton matrix of the mean loss; shape (samples * outputs, size).

        Parameters
        ----------
        inputs, targets : Tensor
            What enters the first segment, and the targets.
        """
        values = {name: value.detach() for name, value in zip(self._names, self._parameters, strict=True)}

        def outputs_of_sample(values: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
            return functional_call(self._chain, values, (sample[None],)).flatten()

        with torch.no_grad():
            outputs = self._chain(inputs)
            derivatives = vmap(jacrev(outputs_of_sample), in_dims=(None, 0), chunk_size=SAMPLES_AT_ONCE)(values, inputs)
            jacobian = torch.cat([derivatives[name].flatten(2) for name in self._names], dim=2)
        return (roots(self._loss, outputs, targets) @ jacobian).flatten(0, 1)


def gram(rows: torch.Tensor) -> torch.Tensor:
    """``R^T R`` of rows of shape (count, size), float32 or float64; shape (size, size)."""
    if rows.device.type != "cpu":
        return rows.T @ rows
    # numpy sees that the result is symmetric and computes half of it (BLAS syrk), which torch does not.
    values = rows.numpy()
    return torch.from_numpy(values.T @ values)


def roots(loss: Loss, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Square roots of each sample's Hessian of the mean loss with respect to its outputs, shape (samples, o, o)."""
    samples, size = len(outputs), outputs[0].numel()
    with torch.enable_grad():
        point = outputs.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(point, targets), point, create_graph=True)
        units = torch.eye(size, dtype=outputs.dtype, device=outputs.device)
        directions = units[:, None].expand(size, samples, size).reshape(size, *outputs.shape)
        (curved,) = torch.autograd.grad(slope, point, directions, is_grads_batched=True)
    values, vectors = torch.linalg.eigh(curved.reshape(size, samples, size).transpose(0, 1))
    # A loss that is not convex in the outputs has negative curvature there, which is left out. The symmetric root:
    # it is unique, so that rows of different ranks belong together.
    return (vectors * values.clamp_min(0.0).sqrt()[:, None, :]) @ vectors.transpose(1, 2)


def pull_rows(
    segments: Sequence[nn.Module], parameters: Sequence[torch.Tensor], inputs: Bundle, rows: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Take rows of derivatives back through segments: from those by their outputs to those by what is before.

    Parameters
    ----------
    segments, parameters
        As in `BlockJacobian`; the segments may be followed by others.
    inputs
        What enters the first segment.
    rows
        For each differentiable tensor that leaves the last segment, the derivatives of k numbers a sample by it, shape
        (k, samples, ...).

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

    def of_sample(sample: Bundle, *rows: torch.Tensor) -> tuple:
        def outputs(values: dict[str, torch.Tensor], *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
            batch = map_tensors(lambda tensor: tensor[None], with_differentiable(sample, parts))
            leaving = functional_call(chain, values, (batch,))
            return tuple(tensor[0] for tensor in differentiable(leaving))

        pull: Callable[..., tuple] = vjp(outputs, values, *differentiable(sample))[1]
        return vmap(lambda *of_row: pull(of_row))(*rows)

    in_dims = (0, *[1] * len(rows))
    derivatives, *by_inputs = vmap(of_sample, in_dims=in_dims, chunk_size=SAMPLES_AT_ONCE)(inputs, *rows)
    by_parameters = torch.cat([derivatives[name].flatten(2) for name in names], dim=2)
    return by_parameters.flatten(0, 1), tuple(part.transpose(0, 1) for part in by_inputs)
