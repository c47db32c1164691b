"""Decoupled weight decay where each rank has a stage: by the length of the step of all of them."""

from dataclasses import replace

import pytest
import torch
from networks import classified, classifier, cross_entropy, options

from apts_mpi import CoarseOptions, StagedAPTS


def vector(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def solver_of(world, decay):
    chosen = options(subdomains=None, initial_radius=0.02, local_data="full", variant="inexact")
    region = replace(chosen.trust_region, weight_decay=decay)
    chosen = replace(chosen, trust_region=region, coarse=CoarseOptions(model="none"))
    return StagedAPTS(classifier(), cross_entropy, comm=world, options=chosen)


@pytest.mark.mpi(min_size=2)
def test_staged_parameters_shrink_as_those_of_one_rank(world):
    if world.size > 3:
        pytest.skip("for at most as many ranks as layers")
    steps = []
    for decay in (0.0, 0.5):
        solver = solver_of(world, decay)
        before = vector(solver.network)
        assert solver.step(classified()).accepted
        steps.append((before, vector(solver.network)))
    (before, end), (_, shrunk) = steps
    parts = world.allgather((float((end - before).square().sum()), len(end)))
    length, size = (sum(column) for column in zip(*parts, strict=True))
    torch.testing.assert_close(shrunk, (1.0 - 0.5 * (length / size) ** 0.5) * end, rtol=1e-12, atol=1e-14)
