"""The picture of a solution and its error."""

import numpy as np
import pytest

from apts_mpi.errors import InvalidInput
from apts_mpi.plot.solution import plot_solution

AXES = np.linspace(0.0, 1.0, 5), np.linspace(-1.0, 1.0, 7)
VALUES = np.outer(AXES[0], AXES[1])


@pytest.mark.parametrize("error", [1e-3, 0.0])
def test_it_is_drawn_also_of_a_network_without_error(tmp_path, error):
    files = [tmp_path / "a.svg", tmp_path / "a.png"]
    plot_solution(AXES, VALUES, VALUES + error * AXES[1], files)
    assert all(file.stat().st_size > 1000 for file in files)


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(InvalidInput, match="cannot be written"):
        plot_solution(AXES, VALUES, VALUES, [tmp_path / "none" / "a.png"])
