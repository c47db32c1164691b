"""Helmholtz's equation on a square with two waves across it, as deepxde's users write it, trained with APTS.

    python -m apts_mpi.train --problem docs/examples/deepxde_helmholtz.py:problem --dtype float64
"""

import os

os.environ.setdefault("DDE_BACKEND", "pytorch")

import deepxde as dde
import numpy as np
import torch

from apts_mpi.problems import from_deepxde

WAVE_NUMBER = 4.0 * np.pi


def data_and_network():
    """-laplace(u) - k^2 u = k^2 sin(k x) sin(k y), u = 0 on the boundary by construction; u = sin(k x) sin(k y)."""
    dde.config.set_default_float("float64")

    def equation(x, u):
        laplacian = dde.grad.hessian(u, x, i=0, j=0) + dde.grad.hessian(u, x, i=1, j=1)
        source = WAVE_NUMBER**2 * torch.sin(WAVE_NUMBER * x[:, :1]) * torch.sin(WAVE_NUMBER * x[:, 1:])
        return -laplacian - WAVE_NUMBER**2 * u - source

    square = dde.geometry.Rectangle([0, 0], [1, 1])
    data = dde.data.PDE(
        square,
        equation,
        [],
        num_domain=900,
        num_boundary=80,
        solution=lambda x: np.prod(np.sin(WAVE_NUMBER * x), axis=1, keepdims=True),
        num_test=2500,
    )
    network = dde.nn.FNN([2] + [40] * 3 + [1], "sin", "Glorot uniform")
    network.apply_output_transform(lambda x, u: u * (x * (1.0 - x)).prod(dim=1, keepdim=True))
    return data, network


def problem():
    """What takes the place of ``dde.Model(...).train(...)``."""
    return from_deepxde(*data_and_network(), name="deepxde-helmholtz", epochs=150)
