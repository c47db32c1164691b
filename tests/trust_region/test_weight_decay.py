"""Decoupled weight decay: what an accepted step leaves is multiplied by 1 - weight_decay |s| / sqrt(n)."""

from dataclasses import replace

import pytest
import torch
from mpi4py import MPI
from networks import classified, classifier, cross_entropy, options

from apts_mpi import APTS, APTSOptions, CoarseOptions, InvalidInput, TrustRegionOptions
from apts_mpi.train.options import TrainingOptions


def vector(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def solver_of(world, decay, coarse="none", **changes):
    chosen = options(subdomains=None, **{"initial_radius": 0.02, **changes})
    region = replace(chosen.trust_region, weight_decay=decay)
    chosen = replace(chosen, trust_region=region, coarse=CoarseOptions(model=coarse))
    return APTS(classifier(), cross_entropy, comm=world, options=chosen)


@pytest.mark.mpi
@pytest.mark.all_sizes(coarse="none")
@pytest.mark.parametrize("coarse", ["none", "gauss-newton"])
@pytest.mark.parametrize("norm", ["2", "inf"])
def test_parameters_shrink_by_the_root_mean_square_of_the_step(world, norm, coarse):
    before = vector(classifier())
    plain, shrunk = (solver_of(world, decay, coarse, norm=norm) for decay in (0.0, 0.5))
    for solver in (plain, shrunk):
        assert solver.step(classified()).accepted
    end = vector(plain.network)
    length = torch.linalg.vector_norm(end - before)
    factor = 1.0 - 0.5 * float(length) / len(end) ** 0.5
    assert factor < 0.9999
    torch.testing.assert_close(vector(shrunk.network), factor * end, rtol=1e-12, atol=1e-14)
    # The next iteration begins there, and not where the step was judged.
    loss = float(cross_entropy(shrunk.network(classified()[0]), classified()[1]).detach())
    assert shrunk.step().schwarz.loss == pytest.approx(loss, rel=1e-12)


def test_rejected_steps_leave_the_parameters():
    solver = solver_of(MPI.COMM_SELF, 0.5, initial_radius=1e3, eta1=0.25)
    before = vector(solver.network)
    assert not solver.step(classified()).accepted
    assert torch.equal(vector(solver.network), before)


def test_a_pull_that_nothing_would_apply_is_refused():
    chosen = APTSOptions(trust_region=TrustRegionOptions(pull=0.1))
    with pytest.raises(InvalidInput, match=r"trust_region.pull: 0.1 is for the plain sum .* --coarse none"):
        APTS(classifier(), cross_entropy, comm=MPI.COMM_SELF, options=chosen)


def test_other_optimizers_have_their_own():
    with pytest.raises(InvalidInput, match="trust_region.weight_decay: 0.1 .* it is for optimizer apts"):
        TrainingOptions(optimizer="adam", trust_region=TrustRegionOptions(weight_decay=0.1))
