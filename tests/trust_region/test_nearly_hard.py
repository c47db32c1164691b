"""The minimiser in a ball where the slope has next to nothing of the lowest eigenvector."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from apts_mpi.trust_region.subproblem import minimise_in_ball


def nearly_hard(size, digits, lowest, multiplicity, seed):
    """An indefinite matrix by its eigenvectors and eigenvalues, and a slope in them."""
    generator = np.random.default_rng(seed)
    vectors, _ = np.linalg.qr(generator.standard_normal((size, size)))
    values = np.concatenate([np.full(multiplicity, -lowest), generator.uniform(0.1, 1.0, size - multiplicity)])
    coefficients = generator.standard_normal(size)
    coefficients[:multiplicity] *= 10.0**-digits
    return vectors, values, coefficients


def best_reduction(values, coefficients, radius):
    """Of the global minimiser in the eigenbasis: bisection for the logarithm of the shift beyond the lowest value."""
    gaps = values - values[0]

    def point(shift):
        return -coefficients / (gaps + shift)

    low, high = -300.0, np.log10(np.linalg.norm(coefficients) / radius + 1.0) + 1.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if np.linalg.norm(point(10.0**middle)) > radius else (low, middle)
    found = point(10.0**high)
    return -(coefficients @ found + 0.5 * values @ found**2)


@given(
    size=st.integers(2, 12), digits=st.floats(0.0, 17.0), lowest=st.floats(1e-3, 10.0), double=st.booleans(),
    reach=st.floats(-1.0, 3.0), seed=st.integers(0, 999),
)  # fmt: skip
def test_nothing_of_the_decrease_is_lost(size, digits, lowest, double, reach, seed):
    vectors, values, coefficients = nearly_hard(size, digits, lowest, min(1 + double, size - 1), seed)
    radius = 10.0**reach
    step = minimise_in_ball((vectors * values) @ vectors.T, vectors @ coefficients, radius)
    own = vectors.T @ step
    assert np.linalg.norm(step) <= radius * (1.0 + 1e-9)
    found = -(coefficients @ own + 0.5 * values @ own**2)
    assert found >= (1.0 - 1e-9) * best_reduction(values, coefficients, radius)
