"""A line search by halves."""

from __future__ import annotations

from collections.abc import Callable

# Below that share of the step nothing is looked for.
SHORTEST = 1e-9


def search_by_halves(loss: Callable[[float], float], start: float) -> tuple[float, float]:
    """The best of the steps 1, 1/2, 1/4 and so on, as far as each is better than the one before.

    Parameters
    ----------
    loss
        Of the length of the step. What is not a number counts as a rise.
    start
        The loss at 0.

    Returns
    -------
    length, value
        0 and ``start`` where no step goes down.
    """
    length, value = 1.0, loss(1.0)
    while length > SHORTEST:
        half = loss(length / 2.0)
        if value < start and not half < value:
            return length, value
        length, value = length / 2.0, half
    return 0.0, start
