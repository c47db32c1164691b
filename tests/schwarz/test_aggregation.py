"""Grouped columns against dense sums of the columns without groups, in both layouts and with a space of the user's."""

import dataclasses

import networks
import numpy as np
import pytest
import torch
from mpi4py import MPI

from apts_mpi import CoarseOptions, InvalidInput, StagedAPTS
from apts_mpi.curvature.linearisation import Column
from apts_mpi.schwarz import CoarseSpace
from apts_mpi.schwarz.aggregation import share_of_groups
from apts_mpi.schwarz.reduced_model import ReducedModel


class Twice(CoarseSpace):
    """A space of the user's: of each part the gradient, and noise of a seed that is the process's own."""

    def columns(self, state):
        gradients = [Column(start, stop, state.gradient[start:stop]) for start, stop in state.parts]
        return gradients + [Column(start, stop, torch.randn(stop - start).double()) for start, stop in state.parts]


def chosen(largest, subdomains=6, **coarse):
    base = networks.options(solver="kfac", variant="inexact", local_data="full", subdomains=subdomains)
    options = CoarseOptions(model="gauss-newton", largest=largest, samples=1.0, **coarse)
    return dataclasses.replace(base, coarse=options)


def solver_after(steps, options, comm=MPI.COMM_SELF):
    solver = networks.make_solver(comm, options)
    for _ in range(steps):
        solver.step(networks.classified())
    return solver


def values(solver):
    return solver.holding.objective.vector.values


def dense(columns, size):
    matrix = np.zeros((size, len(columns)))
    for number, column in enumerate(columns):
        matrix[column.start : column.stop, number] = column.values.numpy()
    return matrix


def test_grouped_columns_are_sums_and_the_step_is_that_of_the_dense_model():
    """Both solvers are at one point: of 12 columns six are made, and the step is the best in their span."""
    size = len(values(networks.make_solver(MPI.COMM_SELF, chosen(6))))
    alone, grouped = (networks.make_solver(MPI.COMM_SELF, chosen(largest)) for largest in (None, 7))
    generator = torch.Generator().manual_seed(2)
    last = torch.randn(size, dtype=torch.float64, generator=generator)
    for solver in (alone, grouped):
        solver.holding.coarse.last_step.copy_(0.01 * last)
        result = solver.step(networks.classified())
    fine, coarse = (solver.holding.coarse for solver in (alone, grouped))
    assert (len(fine._columns), len(coarse._columns)) == (12, 6)
    sums = np.kron(np.eye(6), np.ones((2, 1)))
    # Of the last step before, which the columns show no more: it is the present one by now.
    lasts = [Column(column.start, column.stop, 0.01 * last[column.start : column.stop]) for column in fine._columns[6:]]
    span = dense([*fine._columns[:6], *lasts], size) @ sums
    np.testing.assert_allclose(dense(coarse._columns[:3], size), span[:, :3], rtol=1e-14)
    whole = fine.model
    np.testing.assert_allclose(coarse.model.curvature, sums.T @ whole.curvature @ sums, rtol=1e-8, atol=1e-14)
    np.testing.assert_allclose(coarse.model.gram, span.T @ span, rtol=1e-10, atol=1e-14)
    expected = ReducedModel(sums.T @ whole.slope, sums.T @ whole.curvature @ sums, span.T @ span)
    coefficients = expected.minimise(result.schwarz.radius, 0.1, "2")
    np.testing.assert_allclose(coarse.step.numpy(), span @ coefficients, rtol=1e-6, atol=1e-10)
    assert result.schwarz.predicted_reduction == pytest.approx(expected.reduction(coefficients), rel=1e-8)


@pytest.mark.parametrize("largest", [12, 1000])
def test_a_bound_of_all_columns_changes_no_bit(largest):
    one, other = (solver_after(3, chosen(bound)) for bound in (None, largest))
    assert torch.equal(values(one), values(other))


@pytest.mark.parametrize("space", ["subdomains", f"{__name__}:Twice"])
@pytest.mark.parametrize(("largest", "columns"), [(5, 4), (11, 10), (2, 2)])
def test_as_many_groups_as_the_bound_allows(space, largest, columns):
    solver = networks.make_solver(MPI.COMM_SELF, chosen(largest, space=space))
    torch.manual_seed(0)
    solver.step(networks.classified())
    coarse = solver.holding.coarse
    assert len(coarse._columns) == columns
    kinds = np.abs(dense(coarse._columns, len(values(solver)))) > 0.0
    # Every parameter is in one column of each kind.
    assert (kinds.sum(axis=1) == 2).all()


def test_counting_the_columns_moves_no_random_numbers():
    """As a run that goes on counts them anew, where one that was never stopped does not."""
    solver = networks.make_solver(MPI.COMM_SELF, chosen(4, space=f"{__name__}:Twice"))
    torch.manual_seed(7)
    solver.step(networks.classified())
    torch.manual_seed(7)
    for column in solver.holding.coarse._columns[2:]:
        assert torch.equal(column.values, torch.randn(len(column.values)).double())


def test_a_bound_that_cannot_be_held_is_refused():
    solver = networks.make_solver(MPI.COMM_SELF, chosen(1))
    with pytest.raises(InvalidInput, match=r"coarse.largest: 1 is too few, .* gives 2 columns; give 2 or more"):
        solver.step(networks.classified())


def test_subdomains_of_data_are_grouped_too_and_their_mean_is_of_all():
    base = networks.options(solver="sgd", variant="exact", local_data="shard", decomposition="data", subdomains=6)
    options = dataclasses.replace(base, coarse=CoarseOptions(model="gauss-newton", samples=1.0, largest=4))
    solver = solver_after(1, options)
    coarse = solver.holding.coarse
    assert len(coarse._columns) == 4  # three of two shards, and the last step
    corrections = coarse._corrections
    assert len(corrections) == 6
    pair = corrections[0].values + corrections[1].values
    torch.testing.assert_close(coarse._columns[0].values, pair)
    coarse._sum_up(1e3)
    torch.testing.assert_close(coarse.step, sum(column.values for column in corrections) / 6.0)


@pytest.mark.parametrize("stages", [[5, 1, 4], [1, 1, 8], [3], [1, 1], [7, 6, 6, 7]])
def test_stages_share_the_groups(stages):
    everywhere = sum(stages)
    for groups in range(len(stages), everywhere + 1):
        shares = [share_of_groups(groups, own, everywhere, len(stages)) for own in stages]
        assert all(1 <= share <= own for share, own in zip(shares, stages, strict=True)) and sum(shares) <= groups
        if groups == everywhere:
            assert shares == stages


@pytest.mark.mpi
def test_columns_of_stages_are_sums_too(world):
    """The model on rank 0 is that of the replicated layout without groups, added up by the groups of each stage."""
    options = chosen(2 * world.size + 1)
    fine = networks.make_solver(MPI.COMM_SELF, dataclasses.replace(options, coarse=chosen(None).coarse))
    last = 0.01 * torch.randn(len(values(fine)), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    fine.holding.coarse.last_step.copy_(last)
    fine.step(networks.classified())
    solver = StagedAPTS(networks.classifier(), networks.cross_entropy, comm=world, options=options)
    coarse, parts = solver.holding.coarse, solver.holding.decomposition.subdomains
    held = world.allgather((len(values(solver)), len(parts)))
    start = sum(size for size, _ in held[: world.rank])
    coarse.last_step.copy_(last[start : start + len(values(solver))])
    solver.step(networks.classified())
    groups = world.allgather(coarse._groups.own)
    if world.rank == 0:
        whole, model = fine.holding.coarse.model, coarse.model
        sums = np.concatenate([of_stage(held, groups, stage) for stage in range(world.size)], axis=1)
        assert model.slope.shape == (2 * sum(groups),) and len(model.slope) <= 2 * world.size + 1
        np.testing.assert_allclose(model.slope, sums.T @ whole.slope, rtol=1e-8, atol=1e-14)
        np.testing.assert_allclose(model.gram, sums.T @ whole.gram @ sums, rtol=1e-8, atol=1e-14)
        np.testing.assert_allclose(model.curvature, sums.T @ whole.curvature @ sums, rtol=1e-7, atol=1e-13)


def of_stage(held, groups, stage):
    """The columns of a stage, corrections and last steps, as sums of the twelve without groups, shape (12, m)."""
    first, own = sum(number for _, number in held[:stage]), held[stage][1]
    found = np.zeros((12, 2 * groups[stage]))
    for index in range(own):
        group = next(g for g in range(groups[stage]) if index < (g + 1) * own // groups[stage])
        for kind in range(2):
            found[6 * kind + first + index, groups[stage] * kind + group] = 1.0
    return found


@pytest.mark.mpi
@pytest.mark.all_sizes(largest=5)
@pytest.mark.parametrize("largest", [5, 8])
def test_iterates_do_not_depend_on_the_ranks(world, largest):
    one, other = (solver_after(4, chosen(largest), comm) for comm in (world, MPI.COMM_SELF))
    torch.testing.assert_close(values(one), values(other), rtol=1e-8, atol=1e-12)
