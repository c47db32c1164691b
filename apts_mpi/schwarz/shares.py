"""Who hands out which part of the corrections, and how much each subdomain counts where they overlap."""

from __future__ import annotations

import torch

from apts_mpi.network.decomposition import Decomposition
from apts_mpi.network.partition import Subdomain, multiplicity
from apts_mpi.trust_region.norms import NormKind, subdomain_radius


def weights_of(decomposition: Decomposition, like: torch.Tensor, is_sum: bool) -> dict[int, torch.Tensor]:
    """W_d of the carried subdomains: one over the number of subdomains that share an index, or 1 in a plain sum."""
    weights = {}
    for subdomain in decomposition.carried:
        weight = torch.empty(subdomain.stop - subdomain.start, dtype=like.dtype, device=like.device)
        for start, stop, count in multiplicity(decomposition.subdomains, subdomain):
            weight[start - subdomain.start : stop - subdomain.start] = 1.0 if is_sum else 1.0 / count
        weights[subdomain.index] = weight
    return weights


def led_range(decomposition: Decomposition, rank: int) -> tuple[int, int]:
    """Range of the vector whose correction a rank hands out: its team's if it leads the team, else none."""
    carried, leads = _of_team(decomposition, rank)
    start = decomposition.subdomains[carried[0]].owned_start
    return start, decomposition.subdomains[carried[-1]].owned_stop if leads else start


def led_rows(decomposition: Decomposition, size: int, rank: int) -> tuple[int, int]:
    """The same of the stack of corrections, which has a row of ``size`` elements a subdomain."""
    carried, leads = _of_team(decomposition, rank)
    return carried.start * size, (carried.stop if leads else carried.start) * size


def local_radius(radius: float, count: int, norm: NormKind, is_data: bool) -> float:
    """Of each subdomain's ball, so that the assembled correction lies in that of ``radius``."""
    return radius / count if is_data else subdomain_radius(radius, count, norm)


def handed_out(subdomain: Subdomain, values: torch.Tensor, of_block: slice | None = None) -> tuple[slice, torch.Tensor]:
    """Of values of a block, or of a part of it alone, those that a rank speaks for, and their place in the vector."""
    if of_block is not None:
        start = subdomain.start + of_block.start
        return slice(start, start + len(values)), values
    owned = slice(subdomain.owned_start, subdomain.owned_stop)
    return owned, values[owned.start - subdomain.start : owned.stop - subdomain.start]


def _of_team(decomposition: Decomposition, rank: int) -> tuple[range, bool]:
    """The subdomains that a rank carries, and whether it leads its team."""
    teams = decomposition.teams
    team = teams.team_of(rank)
    return teams.subdomains_of(team), teams.ranks_of(team).start == rank
