"""The check in the first step that a loss is the mean over the samples; what it finds is compared with plain torch."""

import pytest
import torch
from networks import classified, classifier, flat, make_solver, numbers, options
from staged_networks import mlp
from torch import nn

import apts_mpi.replicated
import apts_mpi.staged.holding
import apts_mpi.train.baselines
from apts_mpi import APTS, APTSOptions, InvalidInput, PipelineOptions, StagedAPTS
from apts_mpi.errors import SharedInvalidInput
from apts_mpi.objective.loss_check import check_loss, some_rows
from apts_mpi.problems.losses import token_cross_entropy, weighted_squared_error
from apts_mpi.train.baselines import DataParallel
from apts_mpi.train.options import BaselineOptions

F = nn.functional
WEIGHTS = torch.tensor([1.0, 5.0, 20.0], dtype=torch.float64)
SAMPLES = 24


def draw(*shape):
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def classes(*shape):
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(5))


def signs():
    return (classes(SAMPLES, 3) > 0).double()


def squeezing(outputs, targets):
    return F.cross_entropy(outputs.squeeze(), targets)


def normalised(outputs, targets):
    return (outputs - outputs.mean(0) - targets).square().mean()


def dice(outputs, targets):
    chances = outputs.sigmoid()
    return 1 - 2 * (chances * targets).sum() / (chances.sum() + targets.sum())


# Loss, outputs and targets; the first ones are means over the samples.
MEANS = {
    "cross entropy": (F.cross_entropy, draw(SAMPLES, 3), classes(SAMPLES)),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), draw(SAMPLES, 3), classes(SAMPLES)),
    "pixels": (F.cross_entropy, draw(SAMPLES, 3, 5), classes(SAMPLES, 5)),
    "tokens": (token_cross_entropy, draw(SAMPLES, 5, 3), classes(SAMPLES, 5)),
    "weights of its own": (
        lambda outputs, targets: (WEIGHTS[targets] * F.cross_entropy(outputs, targets, reduction="none")).mean(),
        draw(SAMPLES, 3),
        classes(SAMPLES),
    ),
    "squared error": (F.mse_loss, draw(SAMPLES, 3), draw(SAMPLES, 3).detach() + 1),
    "absolute error": (F.l1_loss, draw(SAMPLES, 3), draw(SAMPLES, 3).detach() + 1),
    "weighted squared error": (weighted_squared_error, draw(SAMPLES, 1), draw(SAMPLES, 2).detach()),
    "two answers": (F.binary_cross_entropy_with_logits, draw(SAMPLES, 3), signs()),
    "energy": (lambda outputs, targets: outputs.mean(), draw(SAMPLES, 1), classes(SAMPLES)),
    "squeeze": (squeezing, draw(SAMPLES, 3, 1), classes(SAMPLES)),
    "single precision": (F.cross_entropy, draw(SAMPLES, 3).detach().float().requires_grad_(), classes(SAMPLES)),
}
OTHERS = {
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), draw(SAMPLES, 3), classes(SAMPLES)),
    "nearly equal weights": (nn.CrossEntropyLoss(weight=1 + 1e-3 * WEIGHTS), draw(SAMPLES, 3), classes(SAMPLES)),
    "ignored class": (nn.CrossEntropyLoss(ignore_index=0), draw(SAMPLES, 3), classes(SAMPLES)),
    "ignored tokens": (nn.CrossEntropyLoss(ignore_index=0), draw(SAMPLES, 3, 5), classes(SAMPLES, 5)),
    "sum": (nn.MSELoss(reduction="sum"), draw(SAMPLES, 3), draw(SAMPLES, 3).detach() + 1),
    "root": (lambda *pair: F.mse_loss(*pair).sqrt(), draw(SAMPLES, 3), draw(SAMPLES, 3).detach().flip(0)),
    "batch coupled": (normalised, draw(SAMPLES, 3), draw(SAMPLES, 3).detach() + 1),
    "dice": (dice, draw(SAMPLES, 3), signs()),
}


def mean_of_singles(loss, outputs, targets):
    return torch.stack([loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(targets))]).mean()


@pytest.mark.parametrize("name", MEANS)
def test_means_pass(name):
    loss, outputs, targets = MEANS[name]
    if name != "squeeze":  # which cannot take one sample
        torch.testing.assert_close(loss(outputs, targets), mean_of_singles(loss, outputs, targets))
    check_loss(loss, outputs, targets)
    assert outputs.grad is None


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_named(name):
    loss, outputs, targets = OTHERS[name]
    whole, mean = loss(outputs, targets).item(), mean_of_singles(loss, outputs, targets).item()
    assert whole != pytest.approx(mean, rel=1e-6)
    with pytest.raises(
        InvalidInput, match=f"loss: it is not the mean over the samples .*: {whole:.6g} for 24 "
    ) as seen:
        check_loss(loss, outputs, targets)
    assert "\n" not in str(seen.value)


def test_equal_losses_do_not_hide_weights():
    """Behind a last layer that is zero all classes are as likely, and all losses log 3."""
    outputs = torch.zeros(SAMPLES, 3, requires_grad=True)
    check_loss(F.cross_entropy, outputs, classes(SAMPLES))
    with pytest.raises(InvalidInput, match="differ in their gradients"):
        check_loss(nn.CrossEntropyLoss(weight=WEIGHTS.float()), outputs, classes(SAMPLES))


@pytest.mark.parametrize("of", [lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: {0: a, 1: {"b": b}}])
def test_outputs_of_several_tensors(of):
    def part(outputs):
        return outputs[1]["b"] if isinstance(outputs, dict) else outputs[1]

    def loss(outputs, targets):
        return F.cross_entropy(outputs[0], targets) + part(outputs).mean()

    first, second, no_rows = draw(SAMPLES, 3), draw(SAMPLES, 2), draw(7)
    check_loss(loss, of(first, second), classes(SAMPLES))
    check_loss(loss, of(first, no_rows), classes(SAMPLES))
    with pytest.raises(InvalidInput, match="loss: it is not the mean"):
        check_loss(lambda *pair: loss(*pair) + part(pair[0]).sum(), of(first, second), classes(SAMPLES))


@pytest.mark.parametrize(
    ("loss", "outputs"),
    [
        (lambda outputs, targets: outputs.sum(), draw(5)),
        (lambda outputs, targets: F.dropout(outputs).mean(), draw(SAMPLES, 3)),
        (lambda outputs, targets: outputs.log().sum(), draw(SAMPLES, 3)),
        (lambda outputs, targets: outputs.sum(), draw(3, 2)),
    ],
    ids=["no rows of samples", "random", "not finite", "too few samples"],
)
def test_what_is_not_compared(loss, outputs):
    check_loss(loss, outputs, classes(3 if len(outputs) == 3 else SAMPLES))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.MSELoss(reduction="none"), r"loss: it returns a tensor of torch.float64 with shape \(24, 3\); return the"),
        (lambda *pair: F.mse_loss(*pair)[None], r"loss: it returns a tensor of torch.float64 with shape \(1,\); "),
        (lambda *pair: (pair[0] > 0).sum(), r"loss: it returns a tensor of torch.int64 with shape \(\); "),
        (lambda *pair: 1.5, "loss: it returns float 1.5; return the mean"),
        (lambda *pair: F.mse_loss(*pair).detach(), "loss: it has no gradient"),
    ],
    ids=["none", "one number in a row", "counts", "float", "detached"],
)
def test_what_is_no_loss(loss, message):
    with pytest.raises(InvalidInput, match=message):
        check_loss(loss, draw(SAMPLES, 3), draw(SAMPLES, 3).detach())


def test_rows_are_of_the_batch_and_different_on_each_rank():
    chosen = torch.arange(1000, 1300, 2)
    few = [some_rows(2000, chosen, 100, rank) for rank in range(3)]
    assert all(len(rows.unique()) == 64 and set(rows.tolist()) <= set(chosen.tolist()) for rows in few)
    assert len({tuple(rows.tolist()) for rows in few}) == 3
    assert [len(some_rows(count, None, samples, 0)) for count, samples in ((9, 1), (9, 6), (2, 2))] == [4, 6, 2]


def with_ignored():
    """The first third, all of rank 0's on three ranks, does not count."""
    inputs, targets = classified(60)
    targets[:20] = -100
    return inputs, targets


def hidden(loss):
    """The same of which nobody knows what it is."""
    return lambda outputs, targets: loss(outputs, targets)


REFUSED = {
    "class weights": (hidden(nn.CrossEntropyLoss(weight=WEIGHTS)), classified(60)),
    "ignored": (hidden(nn.CrossEntropyLoss()), with_ignored()),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), classified(60)),
    "sorted": (
        hidden(nn.CrossEntropyLoss(weight=WEIGHTS)),
        tuple(part[classified(60)[1].argsort()] for part in classified(60)),
    ),
}


@pytest.mark.mpi
@pytest.mark.all_sizes(name="ignored", subdomains=3)
@pytest.mark.parametrize("subdomains", [1, 3])
@pytest.mark.parametrize("name", REFUSED)
def test_first_step_names_it_on_all_ranks(world, name, subdomains):
    loss, batch = REFUSED[name]
    network = classifier()
    before = flat(network.parameters())
    solver = make_solver(world, options(subdomains=subdomains), network, loss)
    with pytest.raises(SharedInvalidInput, match="loss: it is not the mean"):
        solver.step(batch)
    assert torch.equal(flat(network.parameters()), before)


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_one_rank_speaks_for_all(world):
    """With shards: only the last rank sees what is ignored."""
    inputs, targets = classified(20 * world.size)
    targets[-10:] = -100
    shard = slice(20 * world.rank, 20 * world.rank + 20)
    chosen = options(subdomains=world.size, partition="index", batch="shard")
    solver = make_solver(world, chosen, loss=hidden(nn.CrossEntropyLoss()))
    where = f"rank {world.size - 1}: " if world.size > 1 else ""
    with pytest.raises(SharedInvalidInput, match=f"^{where}loss: it is not the mean"):
        solver.step((inputs[shard], targets[shard]))


@pytest.mark.mpi
@pytest.mark.parametrize("name", REFUSED)
def test_baselines(world, name):
    loss, batch = REFUSED[name]
    solver = DataParallel(classifier(), loss, comm=world, options=BaselineOptions(optimizer="adam", learning_rate=0.01))
    with pytest.raises(SharedInvalidInput, match="loss: it is not the mean"):
        solver.step(batch)


@pytest.mark.mpi
@pytest.mark.all_sizes(name="ignored")
@pytest.mark.parametrize("name", REFUSED)
def test_staged(world, name):
    loss, batch = REFUSED[name]
    chosen = APTSOptions(layout="staged", stall_timeout=60.0, pipeline=PipelineOptions(micro_batches=4))
    torch.manual_seed(0)
    solver = StagedAPTS(mlp().double(), loss, comm=world, options=chosen)
    own = (batch[0] if world.rank == 0 else None, batch[1] if world.rank == world.size - 1 else None)
    with pytest.raises(SharedInvalidInput, match="loss: it is not the mean"):
        solver.step(own)
    torch.manual_seed(0)
    solver = StagedAPTS(mlp().double(), F.cross_entropy, comm=world, options=chosen)
    inputs, targets = classified(60)
    result = solver.step((inputs if world.rank == 0 else None, targets if world.rank == world.size - 1 else None))
    assert result.accepted


@pytest.mark.mpi
@pytest.mark.parametrize("staged", [False, True])
def test_it_leaves_no_trace(world, monkeypatch, staged):
    """The run, running statistics and the random state are, to the bit, as without it; so are the gradients."""

    def run():
        torch.manual_seed(3)
        network = nn.Sequential(
            *(part for _ in range(4) for part in (nn.Linear(10, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Dropout(0.2))),
            nn.Linear(10, 3),
        )
        solver = (
            StagedAPTS(network, F.cross_entropy, comm=world, options=APTSOptions(layout="staged", stall_timeout=60.0))
            if staged
            else APTS(network, F.cross_entropy, comm=world, options=APTSOptions(subdomains=4))
        )
        inputs, targets = classified(60)
        results = [numbers(solver.step((inputs.float(), targets))) for _ in range(2)]
        return results, flat(network.state_dict().values()), torch.get_rng_state()

    found = run()
    monkeypatch.setattr(apts_mpi.replicated, "check_objective", lambda *_: None)
    monkeypatch.setattr(apts_mpi.staged.holding, "check_staged_objective", lambda *_: None)
    expected = run()
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])


@pytest.mark.mpi
def test_it_is_made_once(world, monkeypatch):
    calls = []
    for module in (apts_mpi.replicated, apts_mpi.train.baselines):
        monkeypatch.setattr(module, "check_objective", lambda *_: calls.append(1))
    solvers = [
        make_solver(world, options()),
        DataParallel(
            classifier(), F.cross_entropy, comm=world, options=BaselineOptions(optimizer="sgd", learning_rate=0.01)
        ),
    ]
    for solver in solvers:
        for seed in range(3):
            solver.step(classified(seed=seed))
    assert len(calls) == 2
