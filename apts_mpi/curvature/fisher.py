"""Kronecker factors of the Fisher matrix itself: of what the network predicts, not of the labels that it was given.

At the end of a task the gradients of its labels are next to zero, and the factors of K-FAC's running means, which are
made of them, with these. The Gauss-Newton matrix of a loss such as cross entropy is the Fisher matrix of the predicted
distribution (Martens, arXiv 1412.1193), which does not vanish; it is summed here exactly, over all outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from apts_mpi.curvature.kinds import KroneckerFactors
from apts_mpi.curvature.layer import LayerBatch
from apts_mpi.curvature.loss_curvature import read_outputs, roots, side_by_side
from apts_mpi.network.recorder import LayerRecorder
from apts_mpi.objective.passes import Mean
from apts_mpi.tools.trees import Tree, count_samples


def fisher_factors(
    chain: nn.Module,
    layers: Sequence[tuple[nn.Module, KroneckerFactors]],
    loss: Mean,
    inputs: Tree,
    targets: Tree,
) -> list[list[torch.Tensor]]:
    """Factors A and G of each layer, whose product ``A (x) G`` stands for its block of the Fisher matrix.

    Parameters
    ----------
    chain
        The network, called with the inputs; in evaluation mode.
    layers
        Modules of it with what knows the shapes of their factors.
    loss
        The mean over the samples of a convex loss of their outputs.
    inputs, targets
        Some samples; of targets nothing but their shapes counts for such a loss as cross entropy.

    Returns
    -------
    list of [Tensor, shape (columns, columns) or (columns,), Tensor, shape (rows, rows) or (rows,)]
        Means over the samples, of the dtype of the parameters.
    """
    samples = count_samples(inputs)
    recorder = LayerRecorder([module for module, _ in layers])
    with torch.enable_grad(), recorder.recording() as records:
        outputs = chain(inputs)
        places = read_outputs(loss, outputs, targets)
        side = side_by_side(outputs, places)
    root = roots(loss, outputs, targets, places)
    parameters = [parameter for module, _ in layers for parameter in module.parameters()]
    found: list[list[torch.Tensor]] = []
    for number in range(root.shape[1]):
        # The hooks of the records take the gradient at each layer's outputs.
        torch.autograd.grad(side, parameters, root[:, number], retain_graph=True, allow_unused=True)
        fresh = []
        for module, curvature in layers:
            batch = LayerBatch([record for record in records if record.module is module], samples)
            inputs_side, outputs_side = curvature.means(curvature.sums(batch), samples)
            # Roots have 1/samples under them, where gradients of the mean loss have it twice in their squares.
            fresh.append([inputs_side, outputs_side / samples])
        if not found:
            found = fresh
        else:
            for total, own in zip(found, fresh, strict=True):
                total[1] += own[1]
    return found
