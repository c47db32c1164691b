"""What convolutions multiply their weights by."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def patches(inputs: torch.Tensor, module: Convolution) -> torch.Tensor:
    """What a convolution multiplies its weights by, as rows, one a sample and position."""
    found = _padded(inputs, module)
    places = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for dimension, (size, stride, dilation) in enumerate(places, start=2):
        found = found.unfold(dimension, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return found.movedim(1, -len(module.kernel_size) - 1).reshape(-1, module.weight[0].numel())


def _padded(inputs: torch.Tensor, module: Convolution) -> torch.Tensor:
    """The inputs with the margins that the convolution adds."""
    if module.padding == "same":
        totals = [dilation * (size - 1) for size, dilation in zip(module.kernel_size, module.dilation, strict=True)]
        margins = [(total // 2, total - total // 2) for total in totals]
    else:
        margins = [] if module.padding == "valid" else [(int(margin), int(margin)) for margin in module.padding]
    if not any(map(any, margins)):
        return inputs
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(inputs, [side for pair in reversed(margins) for side in pair], mode=mode)
