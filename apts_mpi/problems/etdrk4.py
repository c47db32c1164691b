"""Periodic reaction-diffusion systems in Fourier space: exponential time differencing with Runge-Kutta of order 4.

    w_t = L w + N(w),  L diagonal in Fourier space

The scheme is that of Cox and Matthews (doi 10.1006/jcph.2002.6995), its coefficients are means over circles in the
complex plane, as Kassam and Trefethen compute them without cancellation (doi 10.1137/S1064827502410633).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Points on the upper half of the circle around each eigenvalue.
_CIRCLE = 32


class Coefficients(NamedTuple):
    """Of one step: how the linear part goes on in half of it and all of it, and weights of the nonlinear parts."""

    half: np.ndarray
    whole: np.ndarray
    to_middle: np.ndarray
    first: np.ndarray
    middle: np.ndarray
    last: np.ndarray


def coefficients(linear: np.ndarray, step: float) -> Coefficients:
    """Of a step of that length; ``linear`` are the real eigenvalues of L."""
    z = step * linear[..., None] + np.exp(1j * np.pi * (np.arange(_CIRCLE) + 0.5) / _CIRCLE)
    e = np.exp(z)
    first = (-4.0 - z + e * (4.0 - 3.0 * z + z**2)) / z**3
    middle = (2.0 + z + e * (z - 2.0)) / z**3
    last = (-4.0 - 3.0 * z - z**2 + e * (4.0 - z)) / z**3
    weights = (step * each.mean(axis=-1).real for each in ((np.exp(z / 2.0) - 1.0) / z, first, middle, last))
    return Coefficients(np.exp(step * linear / 2.0), np.exp(step * linear), *weights)


def march(
    start: np.ndarray,
    linear: np.ndarray,
    nonlinear: Callable[[np.ndarray], np.ndarray],
    duration: float,
    steps: int,
    snapshots: int,
) -> np.ndarray:
    """Solve from the values of k functions on a periodic grid.

    Parameters
    ----------
    start : ndarray, (k, nodes)
        Values at equidistant nodes.
    linear : ndarray, (k, nodes // 2 + 1)
        Eigenvalues of L, as `numpy.fft.rfft` orders the modes.
    nonlinear : callable
        N, of (k, nodes) values at the nodes.
    duration : float
    steps : int
        A multiple of ``snapshots``.
    snapshots : int
        Equal intervals at whose ends the values are returned.

    Returns
    -------
    ndarray, (snapshots + 1, k, nodes)
    """
    nodes = start.shape[-1]
    given = coefficients(linear, duration / steps)

    def bend(modes: np.ndarray) -> np.ndarray:
        return np.fft.rfft(nonlinear(np.fft.irfft(modes, nodes)))

    found, modes = [start], np.fft.rfft(start)
    for _ in range(snapshots):
        for _ in range(steps // snapshots):
            modes = _step(modes, given, bend)
        found.append(np.fft.irfft(modes, nodes))
    return np.stack(found)


def _step(modes: np.ndarray, given: Coefficients, bend: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    n0 = bend(modes)
    a = given.half * modes + given.to_middle * n0
    n1 = bend(a)
    n2 = bend(given.half * modes + given.to_middle * n1)
    n3 = bend(given.half * a + given.to_middle * (2.0 * n2 - n0))
    return given.whole * modes + given.first * n0 + 2.0 * given.middle * (n1 + n2) + given.last * n3
