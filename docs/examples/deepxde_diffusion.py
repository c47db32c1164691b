"""A diffusion equation with a source, as deepxde's users write it, trained with APTS.

python -m apts_mpi.train --problem docs/examples/deepxde_diffusion.py:problem --dtype float64
"""

import os

os.environ.setdefault("DDE_BACKEND", "pytorch")

import deepxde as dde
import numpy as np
import torch

from apts_mpi.problems import from_deepxde


def data_and_network():
    """u_t = u_xx + f on (-1, 1), u = sin(pi x) at t = 0, 0 at both ends; u = exp(-t) sin(pi x), coordinates (x, t)."""
    dde.config.set_default_float("float64")

    def solution(x):
        return np.sin(np.pi * x[:, :1]) * np.exp(-x[:, 1:])

    def equation(x, u):
        source = (np.pi**2 - 1.0) * torch.exp(-x[:, 1:]) * torch.sin(np.pi * x[:, :1])
        return dde.grad.jacobian(u, x, i=0, j=1) - dde.grad.hessian(u, x, i=0, j=0) - source

    region = dde.geometry.GeometryXTime(dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 1))
    ends = dde.icbc.DirichletBC(region, solution, lambda x, on_boundary: on_boundary)
    start = dde.icbc.IC(region, solution, lambda x, on_initial: on_initial)
    data = dde.data.TimePDE(
        region,
        equation,
        [ends, start],
        num_domain=40,
        num_boundary=20,
        num_initial=10,
        solution=solution,
        num_test=10000,
    )
    return data, dde.nn.FNN([2] + [32] * 3 + [1], "tanh", "Glorot uniform")


def problem():
    """What takes the place of ``dde.Model(...).train(...)``."""
    return from_deepxde(*data_and_network(), name="deepxde-diffusion", epochs=100)
