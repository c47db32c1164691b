"""Whatever leaves a step by an exception leaves the network where it was last judged, and the solver able to go on."""

import dataclasses
import signal

import pytest
import torch
from mpi4py import MPI
from networks import classified, classifier, cross_entropy, options
from torch import nn

from apts_mpi import APTS, APTSOptions, InvalidInput, LocalOptions


def snapshot(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()} | {"random": torch.get_rng_state()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def make(loss=cross_entropy, **keywords):
    network = classifier(batch_norm=True, dropout=0.2)
    keywords.setdefault("options", APTSOptions(subdomains=3))
    return APTS(network, loss, comm=MPI.COMM_SELF, **keywords)


CASES = {
    "defaults": APTSOptions(subdomains=3),
    "local iterations": APTSOptions(subdomains=3, local=LocalOptions(solver="adam", iterations=3)),
    "global step": options(subdomains=3, global_step="steihaug", initial_radius=None),
    "lsr1": options(subdomains=3, solver="lsr1", iterations=2, global_step="lsr1"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt, SystemExit])
def test_failure_at_any_call_of_a_layer(case, kind):
    """A hook fails at its first, second, ... call of an iteration: in the evaluation, local solves and the trial."""
    solver, failures = make(options=CASES[case]), 0
    batch = classified()
    solver.step(batch)
    calls, limit = [], [10**9]

    def fail(module, inputs):
        calls.append(1)
        if len(calls) == limit[0]:
            raise kind("of a hook")

    solver.network[3].register_forward_pre_hook(fail)
    for number in range(1, 60):
        calls.clear()
        limit[0] = number
        before = snapshot(solver.network)
        accepted = solver.state.accepted
        try:
            solver.step(batch)
        except kind:
            failures += 1
            after = snapshot(solver.network)
            # With a global step, the Schwarz step before it may have been judged and taken.
            # Biases before a normalisation have no gradient.
            names = [
                name
                for name in after
                if name.endswith(("running_mean", "running_var", "0.weight", "num_batches_tracked"))
            ]
            moved = [not torch.equal(before[name], after[name]) for name in names]
            taken = case in ("global step", "lsr1") and all(moved)
            assert torch.equal(before["random"], after["random"])
            assert taken or same(before, after)
            assert solver.state.accepted == accepted
            continue
        break
    else:
        pytest.fail("an iteration has fewer calls")
    assert failures >= 2
    calls.clear()
    limit[0] = 10**9
    losses = [solver.step(batch).schwarz.loss for _ in range(20)]
    assert min(losses) < losses[0]


def test_goes_on_as_if_nothing_had_happened():
    """A failed trial, and then the same batch again: the step is the one that it would have been."""
    one, other = make(options=options(subdomains=3)), make(options=options(subdomains=3))
    batch = classified()
    for solver in (one, other):
        solver.step(batch)
    fails = [True]

    def fail(module, inputs):
        if fails and not torch.is_grad_enabled():
            fails.clear()
            raise MemoryError("no memory in the trial")

    one.network[3].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        one.step(batch)
    one.state.functions -= 1
    ours, theirs = one.step(batch), other.step(batch)
    assert dataclasses.asdict(ours.schwarz) == dataclasses.asdict(theirs.schwarz)
    assert same(snapshot(one.network), snapshot(other.network))


def test_interrupts_by_the_clock():
    """SIGALRM as Ctrl-C, hundreds of times at other moments: the network is always at a point that was judged.

    Without what torch's transforms do for the coarse level: torch leaves those in Python, and an interrupt there may
    leave torch itself with one that is not ended.
    """
    solver = make(options=options(subdomains=3, solver="adam", iterations=2))
    batch = classified()
    solver.step(batch)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGALRM, interrupt)
    judged = snapshot(solver.network)
    interrupted = 0
    try:
        for index in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + 1e-4 * index)
                result = solver.step(batch)
                signal.setitimer(signal.ITIMER_REAL, 0.0)
            except KeyboardInterrupt:
                interrupted += 1
                now = snapshot(solver.network)
                assert torch.equal(now["random"], judged["random"])
                # Taken, and interrupted on the way out: then all of it was.
                moved = [not torch.equal(now[name], judged[name]) for name in now if name != "random"]
                assert all(moved) or not any(moved)
            else:
                assert result.schwarz.loss > 0.0
            judged = snapshot(solver.network)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, earlier)
    assert interrupted > 20
    assert solver.step(batch).schwarz.loss > 0.0


def test_gradients_of_the_users_own_after_a_failed_backward_pass():
    """The sums over ranks that the solver begins within its passes are not begun by others."""
    solver, fails = make(), [True]

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(context, values):
            return values.clone()

        @staticmethod
        def backward(context, gradient):
            if fails:
                raise MemoryError("in the backward pass")
            return gradient

    inputs, targets = classified()
    solver = make(lambda outputs, given: cross_entropy(Fails.apply(outputs), given))
    with pytest.raises(MemoryError):
        solver.step((inputs, targets))
    fails.clear()
    solver.network.zero_grad()
    cross_entropy(solver.network(inputs), targets).backward()
    assert solver.step((inputs, targets)).schwarz.gradient_norm > 0.0


@pytest.mark.mpi
@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_step_without_gradients_is_refused_in_a_sentence(world, block):
    solver = APTS(classifier(), cross_entropy, comm=world, options=options(subdomains=2))
    with block(), pytest.raises(InvalidInput, match=r"call it outside of torch.no_grad\(\)"):
        solver.step(classified())
    assert solver.step(classified()).schwarz.loss > 0.0


def test_anomaly_detection_is_refused_in_a_sentence():
    solver = APTS(classifier(), cross_entropy, comm=MPI.COMM_SELF, options=APTSOptions(subdomains=2))
    with torch.autograd.set_detect_anomaly(True), pytest.raises(InvalidInput, match="anomaly detection is on"):
        solver.step(classified())


@pytest.mark.mpi
def test_step_before_a_batch_is_refused_in_a_sentence(world):
    solver = APTS(classifier(), cross_entropy, comm=world, options=options(subdomains=2))
    with pytest.raises(InvalidInput, match="there is no batch yet"):
        solver.step()


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], "as a Tensor of int64"),
        (torch.arange(16.0), "as a Tensor of int64"),
        (torch.zeros(121, dtype=torch.bool), "as a Tensor of int64"),
        (torch.arange(16).view(4, 4), "as a Tensor of int64"),
        (torch.arange(110, 130), "no sample 129 among 121"),
        (torch.arange(-3, 13), "no sample -3 among 121"),
    ],
    ids=["list", "floats", "mask", "matrix", "too large", "negative"],
)
def test_rows_that_are_none_are_refused_in_a_sentence(world, rows, words):
    solver = APTS(classifier(), cross_entropy, comm=world, options=options(subdomains=2))
    with pytest.raises(InvalidInput, match=words):
        solver.step(classified(), rows)


@pytest.mark.mpi(min_size=2)
def test_intercommunicator_is_refused_in_a_sentence(world):
    """It hung."""
    half = world.Split(world.rank % 2, world.rank)
    inter = half.Create_intercomm(0, world, 1 - world.rank % 2, 7)
    with pytest.raises(InvalidInput, match="an Intercomm has no ranks that could work together"):
        APTS(classifier(), cross_entropy, comm=inter, options=options(subdomains=2))
    inter.Free()
    half.Free()


def test_null_communicator_is_refused_in_a_sentence():
    with pytest.raises(InvalidInput, match=r"MPI.COMM_NULL"):
        APTS(nn.Linear(2, 2), cross_entropy, comm=MPI.COMM_NULL)
