"""The network, its batch and the solver with which both layouts are measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from apts_mpi.options import APTSOptions, LocalOptions, PipelineOptions, SchwarzOptions

CLASSES = 10

# A rank that is late by the time that another one measures alone has not stalled.
PATIENCE = 600.0


def network(layers: int, width: int) -> nn.Sequential:
    """Equal layers, the same on every call; the targets are some of the outputs."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)])


def batch(samples: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs and classes, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(samples, width, generator=generator),
        torch.randint(0, CLASSES, (samples,), generator=generator),
    )


def options(layout: Any, subdomains: int, solver: Any, **pipeline: Any) -> APTSOptions:
    """The same solver in both layouts."""
    return APTSOptions(
        layout=layout,
        subdomains=subdomains,
        schwarz=SchwarzOptions(variant="inexact", local_data="full"),
        local=LocalOptions(solver=solver),
        pipeline=PipelineOptions(**pipeline),
        stall_timeout=PATIENCE,
    )
