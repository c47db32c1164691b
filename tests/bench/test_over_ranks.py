"""Iterations of all ranks beside those of one."""

import pytest

from apts_mpi.bench import over_ranks


@pytest.mark.mpi
def test_table(world, monkeypatch, capfd):
    """A line a problem, on rank 0 alone; the slowest has at least the seconds of the fastest."""
    if world.size == 1:
        return
    monkeypatch.setattr(over_ranks, "TOGETHER", 2)
    over_ranks.over_ranks(["mlp-256"], rounds=1)
    lines = [line for line in capfd.readouterr().out.splitlines() if "mlp-256" in line]
    assert len(lines) == (world.rank == 0)
    for line in lines:
        _, alone, slowest, ratio, solving_alone, solving, spread = line.strip("│ ").split("│")
        assert float(ratio) == pytest.approx(float(slowest) / float(alone), abs=0.02)
        assert 0.0 < float(solving_alone) < float(alone) and 0.0 < float(solving) < float(slowest)
        assert float(spread) >= 1.0
