"""A plain loop of PyTorch with APTS as its optimizer, alone or as ``mpirun -n 2 python plain_loop.py``."""

import torch
from mpi4py import MPI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from apts_mpi.optim import APTS
from apts_mpi.problems import build

torch.manual_seed(0)
rank, ranks = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
inputs, targets = (tensor[: len(tensor) // 2 * 2] for tensor in build("digits").train)
# Each rank has samples of its own, as many as the others.
dataset = TensorDataset(inputs[rank::ranks].flatten(1), targets[rank::ranks])
loader = DataLoader(dataset, batch_size=256 // ranks, shuffle=True, drop_last=True)

network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
optimizer = APTS(network)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20 * len(loader))
for _ in range(20):
    for batch, labels in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(batch), labels)
        loss.backward()
        optimizer.step()
        schedule.step()

network.eval()
with torch.no_grad():
    loss = nn.functional.cross_entropy(network(inputs.flatten(1)), targets)
if rank == 0:
    print(f"loss {loss:.4f}")
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict()}, "plain_loop.pt")
