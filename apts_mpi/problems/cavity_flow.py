"""The flow in a square cavity under a moving lid, by Chebyshev collocation of its stream function.

    1/Re laplace^2 psi = psi_y laplace(psi)_x - psi_x laplace(psi)_y,   u = psi_y,  v = -psi_x

on the unit square, psi = 0 on the walls, u = 1 on the lid at y = 1 and no flow along the other walls; for the
collocation see Trefethen, Spectral Methods in MATLAB (2000). Newton's method begins with the flow without inertia.
"""

import functools

import numpy as np

_NEWTON_STEPS = 8


@functools.cache
def cavity_flow(reynolds: float, degree: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Velocities of the steady flow.

    Parameters
    ----------
    reynolds : float
    degree : int
        Of the polynomials in each coordinate.

    Returns
    -------
    nodes : ndarray, (degree + 1,)
        Chebyshev points in [0, 1], ascending.
    u, v : ndarray, (degree + 1, degree + 1)
        At (x, y) = (nodes[i], nodes[j]). All float64.
    """
    nodes, slope = _chebyshev(degree)
    unit = np.eye(degree + 1)
    along_x, along_y = np.kron(slope, unit), np.kron(unit, slope)
    laplacian = np.kron(slope @ slope, unit) + np.kron(unit, slope @ slope)
    laplacian_x, laplacian_y, biharmonic = along_x @ laplacian, along_y @ laplacian, laplacian @ laplacian
    conditions, rows, lid = _conditions(degree, along_x, along_y)
    psi = np.zeros(len(laplacian))
    for _ in range(_NEWTON_STEPS):
        u, w = (along_y @ psi)[:, None], (along_x @ psi)[:, None]
        matrix = biharmonic / reynolds - u * laplacian_x + w * laplacian_y
        residual = matrix @ psi
        matrix = matrix - (laplacian_x @ psi)[:, None] * along_y + (laplacian_y @ psi)[:, None] * along_x
        matrix[rows], residual[rows] = conditions, conditions @ psi - lid
        psi = psi - np.linalg.solve(matrix, residual)
    shape = degree + 1, degree + 1
    return nodes, (along_y @ psi).reshape(shape), -(along_x @ psi).reshape(shape)


def interpolated(nodes: np.ndarray, values: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Values of the polynomial with these values at the nodes, on the grid of ``x`` and ``y``, (len(x), len(y))."""
    return _basis(nodes, x) @ values @ _basis(nodes, y).T


def _chebyshev(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """The points in [0, 1], and the matrix that differentiates."""
    angles = np.pi * np.arange(degree + 1) / degree
    nodes = 0.5 - 0.5 * np.cos(angles)
    signs = np.where(np.arange(degree + 1) % 2, -1.0, 1.0)
    signs[[0, -1]] *= 2.0
    differences = nodes[:, None] - nodes + np.eye(degree + 1)
    slope = np.outer(signs, 1.0 / signs) / differences
    return nodes, slope - np.diag(slope.sum(axis=1))


def _conditions(degree: int, along_x: np.ndarray, along_y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that hold at the walls, the equations that they take the place of, and their right-hand sides.

    At the walls stand psi = 0, and at the nodes next to them the derivative across the wall beside.
    """
    last = degree
    number = np.arange((degree + 1) ** 2).reshape(degree + 1, degree + 1)
    column, line = np.meshgrid(np.arange(degree + 1), np.arange(degree + 1), indexing="ij")
    on_wall = (np.minimum(column, line) == 0) | (np.maximum(column, line) == last)
    next_to_y = ~on_wall & ((line == 1) | (line == last - 1))
    next_to_x = ~on_wall & ~next_to_y & ((column == 1) | (column == last - 1))
    floor_or_lid = np.where(line == 1, number[:, :1], number[:, last:])
    sides = np.where(column == 1, number[:1], number[last:])
    unit = np.eye(number.size)
    conditions = np.concatenate([unit[number[on_wall]], along_y[floor_or_lid[next_to_y]], along_x[sides[next_to_x]]])
    rows = np.concatenate([number[on_wall], number[next_to_y], number[next_to_x]])
    lid = np.isin(np.arange(len(rows)), on_wall.sum() + np.flatnonzero(line[next_to_y] == last - 1)).astype(float)
    return conditions, rows, lid


def _basis(nodes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Values of the Lagrange polynomials of the nodes, (len(places), len(nodes)), by the barycentric formula."""
    weights = np.where(np.arange(len(nodes)) % 2, -1.0, 1.0)
    weights[[0, -1]] *= 0.5
    differences = places[:, None] - nodes
    at_node = differences == 0.0
    parts = weights / np.where(at_node, 1.0, differences)
    return np.where(at_node.any(axis=1, keepdims=True), at_node, parts / parts.sum(axis=1, keepdims=True))
