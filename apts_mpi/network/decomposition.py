"""The subdomains of a network, and who carries them, as one rank sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from apts_mpi.network.partition import Layer, Subdomain, layers_between
from apts_mpi.network.teams import Teams
from apts_mpi.parallel.communicator import Communicator


@dataclass(frozen=True)
class Decomposition:
    """How the parameters that a rank holds are split.

    Attributes
    ----------
    subdomains
        The subdomains of the flat vector of this rank.
    layers
        The layers there.
    teams
        Which ranks of ``comm`` carry which of them.
    comm, team
        The ranks that hold the same parameters, and those of them that carry the same subdomains as this one.
    count
        Number of all subdomains that share the ball, also of parameters that other ranks hold.
    """

    subdomains: Sequence[Subdomain]
    layers: Sequence[Layer]
    teams: Teams
    comm: Communicator
    team: Communicator
    count: int

    @property
    def carried(self) -> tuple[Subdomain, ...]:
        """The subdomains that this rank carries."""
        own = self.teams.subdomains_of(self.teams.team_of(self.comm.rank))
        return tuple(self.subdomains[index] for index in own)

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its team."""
        return self.team.rank == 0

    def owned_parts(self) -> list[tuple[int, int]]:
        """The ranges that the subdomains own, each once: subdomains of data all have the same, the whole."""
        return sorted({(part.owned_start, part.owned_stop) for part in self.subdomains})

    def layers_of(self, subdomain: Subdomain) -> list[Layer]:
        """The layers that have parameters in a subdomain."""
        return layers_between(self.layers, subdomain.start, subdomain.stop)

    def modules_of(self, network: torch.nn.Module, everywhere: bool = False) -> list[torch.nn.Module]:
        """The modules of the layers of the subdomains that this rank carries, or of all."""
        parts = self.subdomains if everywhere else self.carried
        names = {layer.name: None for part in parts for layer in self.layers_of(part)}
        return [network.get_submodule(layer.name) for layer in self.layers if layer.name in names]
