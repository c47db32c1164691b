"""Burgers' equation, as deepxde's users write it, trained with APTS.

python -m apts_mpi.train --problem docs/examples/deepxde_burgers.py:problem --dtype float64
"""

import os

os.environ.setdefault("DDE_BACKEND", "pytorch")

import deepxde as dde
import numpy as np

from apts_mpi.problems import burgers, from_deepxde


def data_and_network():
    """u_t + u u_x = 0.01 / pi u_xx on (-1, 1), u = -sin(pi x) at t = 0 and 0 at both ends; coordinates are (x, t)."""
    dde.config.set_default_float("float64")

    def equation(x, u):
        u_x = dde.grad.jacobian(u, x, i=0, j=0)
        u_t = dde.grad.jacobian(u, x, i=0, j=1)
        u_xx = dde.grad.hessian(u, x, i=0, j=0)
        return u_t + u * u_x - 0.01 / np.pi * u_xx

    region = dde.geometry.GeometryXTime(dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 0.99))
    ends = dde.icbc.DirichletBC(region, lambda x: 0, lambda x, on_boundary: on_boundary)
    start = dde.icbc.IC(region, lambda x: -np.sin(np.pi * x[:, :1]), lambda x, on_initial: on_initial)
    data = dde.data.TimePDE(
        region,
        equation,
        [ends, start],
        num_domain=2540,
        num_boundary=80,
        num_initial=160,
        solution=lambda x: burgers.solution(x[:, ::-1])[:, None],
        num_test=10000,
    )
    return data, dde.nn.FNN([2] + [20] * 3 + [1], "tanh", "Glorot normal")


def problem():
    """What takes the place of ``dde.Model(...).train(...)``."""
    return from_deepxde(*data_and_network(), name="deepxde-burgers", epochs=200)
