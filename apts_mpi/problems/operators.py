"""Operator learning: a DeepONet learns the antiderivative of random functions.

    u(y) = int_0^y v(x) dx,   v(x) = sum_k a_k sin(k pi x),   u(y) = sum_k a_k (1 - cos(k pi y)) / (k pi)

A sample is one function, known by its values at the sensors, and one point y.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from apts_mpi.problems.layers import mlp
from apts_mpi.problems.problem import Problem

SENSORS = 50
MODES = 5

# Fixes the functions and the points: they are the data, so not the seed of the run.
_TRAIN_SEED, _TEST_SEED = 0, 1


def deeponet_sine(
    dtype: torch.dtype, *, width: int = 40, features: int = 40, functions: int = 1000, points: int = 10
) -> Problem:
    """1,000 functions with 10 points each to train on, 200 others to test."""
    train, test = _tensors(functions, points, _TRAIN_SEED, dtype), _tensors(200, 10, _TEST_SEED, dtype)
    return Problem(
        name="deeponet-sine",
        network=DeepONet(width, features).to(dtype),
        loss=mse_loss,
        train=train,
        test=test,
        batch_size=1000,
        epochs=100,
        metrics={"relative_l2_error": _test_error(*test)},
    )


class DeepONet(nn.Module):
    """Branch and trunk network (Lu et al., arXiv 1910.03193): ``u(v, y) = sum_j branch_j(v) trunk_j(y) + bias``.

    Parameters
    ----------
    width : int
        Of the two hidden layers of each.
    features : int
        Number of products j.
    """

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.branch = mlp([SENSORS, width, width, features], nn.Tanh)
        self.trunk = mlp([1, width, width, features], nn.Tanh)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        """(b, SENSORS + 1), the values at the sensors and y, to (b, 1)."""
        products = self.branch(inputs[:, :SENSORS]) * self.trunk(inputs[:, SENSORS:])
        return products.sum(dim=1, keepdim=True) + self.bias


def antiderivative_samples(functions: int, points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random functions, coefficients a_k normal with deviation 1/k, at random points in [0, 1].

    Parameters
    ----------
    functions, points : int
        Number of functions, and of points for each.
    seed : int

    Returns
    -------
    inputs : ndarray, (functions * points, SENSORS + 1), float64
        v at equidistant sensors in [0, 1], then y.
    targets : ndarray, (functions * points, 1), float64
        u(y).
    """
    random = np.random.default_rng(seed)
    modes = np.arange(1, MODES + 1)
    coefficients = random.standard_normal((functions, MODES)) / modes
    y = random.random((functions, points))
    sensors = np.linspace(0.0, 1.0, SENSORS)
    v = coefficients @ np.sin(np.pi * np.outer(modes, sensors))
    basis = (1.0 - np.cos(np.pi * modes * y[..., None])) / (np.pi * modes)
    u = (basis @ coefficients[..., None]).reshape(-1, 1)
    return np.column_stack([np.repeat(v, points, axis=0), y.ravel()]), u


def _tensors(functions: int, points: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    inputs, targets = antiderivative_samples(functions, points, seed)
    return torch.from_numpy(inputs).to(dtype), torch.from_numpy(targets).to(dtype)


def _test_error(inputs: Tensor, targets: Tensor) -> Callable[[nn.Module], float]:
    def relative_l2_error(network: nn.Module) -> float:
        parameter = next(network.parameters())
        with torch.no_grad():
            difference = network(inputs.to(parameter)).cpu() - targets
        return float(difference.double().norm() / targets.double().norm())

    return relative_l2_error
