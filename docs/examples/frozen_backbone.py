"""A frozen backbone with a new head, then all layers: ``python frozen_backbone.py``, or by ``mpirun -n 2``.

A network of digits 0 to 4 gets a head for 5 to 9; the backbone follows once the head has learned something.
"""

import torch
from mpi4py import MPI
from torch import nn
from torch.nn.functional import cross_entropy

import apts_mpi
from apts_mpi.problems import build

KNOWN = 5
OPTIONS = apts_mpi.APTSOptions(subdomains=1)


def say(*words):
    """Print once, not on every rank."""
    if MPI.COMM_WORLD.rank == 0:
        print(*words)


def train(solver, inputs, targets, epochs, seed):
    """Mini-batches of 200, in an order that is the same on all ranks."""
    shuffled = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(inputs), generator=shuffled)
        for rows in order[: len(order) // 200 * 200].split(200):
            solver.step((inputs, targets), rows)


torch.manual_seed(0)
inputs, targets = build("digits").train
is_known = targets < KNOWN

backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU())
pretrained = nn.Sequential(backbone, nn.Linear(32, KNOWN))
solver = apts_mpi.APTS(pretrained, cross_entropy, comm=MPI.COMM_WORLD, options=OPTIONS)
train(solver, inputs[is_known], targets[is_known], 5, 1)

# The backbone stays: its parameters have no gradient, and in evaluation mode its running statistics do not move.
backbone.requires_grad_(False).eval()
kept = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
network = nn.Sequential(backbone, nn.Linear(32, 10 - KNOWN))
new, labels = inputs[~is_known], targets[~is_known] - KNOWN
solver = apts_mpi.APTS(network, cross_entropy, comm=MPI.COMM_WORLD, options=OPTIONS)
train(solver, new, labels, 3, 2)
with torch.no_grad():
    say(f"head alone: loss {cross_entropy(network(new), labels):.4f}")
assert all(torch.equal(kept[name], tensor) for name, tensor in backbone.state_dict().items())

# All layers, by a solver that knows of them.
network.requires_grad_(True).train()
solver = apts_mpi.APTS(network, cross_entropy, comm=MPI.COMM_WORLD, options=OPTIONS)
train(solver, new, labels, 3, 3)
network.eval()
with torch.no_grad():
    say(f"all layers: loss {cross_entropy(network(new), labels):.4f}")
