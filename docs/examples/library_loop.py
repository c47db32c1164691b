"""A loop over the library's own step, alone or as ``mpirun -n 2 python library_loop.py``."""

import torch
from mpi4py import MPI
from torch import nn
from torch.nn.functional import cross_entropy

from apts_mpi import APTS, APTSOptions
from apts_mpi.problems import build

digits = build("digits")
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
solver = APTS(network, cross_entropy, comm=MPI.COMM_WORLD, options=APTSOptions())
for iteration in range(30):
    # Every rank passes the whole batch; the solver takes this rank's share of it.
    result = solver.step(digits.train)
    if MPI.COMM_WORLD.rank == 0 and iteration % 10 == 9:
        print(f"iteration {iteration + 1}: loss {result.schwarz.loss:.4f}, rho {result.schwarz.rho:.3f}")

inputs, targets = digits.test
with torch.no_grad():
    accuracy = (network(inputs).argmax(dim=1) == targets).float().mean()
if MPI.COMM_WORLD.rank == 0:
    print(f"test accuracy {accuracy:.3f}")
    torch.save(network.state_dict(), "library_loop.pt")
