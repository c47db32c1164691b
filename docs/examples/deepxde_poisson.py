"""Poisson's equation on an interval, as deepxde's users write it, trained with APTS.

python -m apts_mpi.train --problem docs/examples/deepxde_poisson.py:problem --dtype float64
"""

import os

os.environ.setdefault("DDE_BACKEND", "pytorch")

import deepxde as dde
import numpy as np
import torch

from apts_mpi.problems import from_deepxde


def data_and_network():
    """-u'' = pi^2 sin(pi x) on (-1, 1), u = 0 at both ends; the solution is sin(pi x)."""
    dde.config.set_default_float("float64")

    def equation(x, u):
        return -dde.grad.hessian(u, x) - np.pi**2 * torch.sin(np.pi * x)

    interval = dde.geometry.Interval(-1, 1)
    ends = dde.icbc.DirichletBC(interval, lambda x: 0, lambda x, on_boundary: on_boundary)
    data = dde.data.PDE(
        interval, equation, ends, num_domain=16, num_boundary=2, solution=lambda x: np.sin(np.pi * x), num_test=100
    )
    return data, dde.nn.FNN([1] + [50] * 3 + [1], "tanh", "Glorot uniform")


def problem():
    """What takes the place of ``dde.Model(...).train(...)``."""
    return from_deepxde(*data_and_network(), name="deepxde-poisson", epochs=60)
