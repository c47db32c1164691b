"""The tensors of a network in their places, to be put back where what has exchanged them was interrupted."""

from __future__ import annotations

import torch


class Places:
    """The parameters and buffers that the modules of a network have now; no copies.

    Parameters
    ----------
    network
        The network.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self._held = [(module, dict(module._parameters), dict(module._buffers)) for module in network.modules()]

    def put_back(self) -> None:
        """Let the modules have these tensors again: passes run on copies of buffers, and tangents on other parameters."""
        for module, parameters, buffers in self._held:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
