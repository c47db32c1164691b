"""The one place for clock, environment and random state, and the timers of events."""

import time

import pytest
import torch

from apts_mpi.tools import environment
from apts_mpi.tools.events import Events

CPU = torch.device("cpu")


def test_streams_are_equal_for_equal_keys_alone():
    draws = []
    for key in ((0, 1, 2), (0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1), (0, 1, 2, 0)):
        environment.seed_stream(CPU, *key)
        draws.append(torch.rand(4).tolist())
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws[1:]}) == 5


def test_streams_of_neighbouring_keys_are_not_alike():
    """As generators seeded with neighbouring numbers may be."""
    draws = []
    for key in range(200):
        environment.seed_stream(CPU, 0, key)
        draws.append(torch.rand(50))
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(200)
    assert correlation.diagonal(1).mean().abs() < 0.05  # of 199 correlations of 50 numbers: 0.14 / 14


def test_random_state_is_preserved_through_an_error():
    torch.manual_seed(4)
    before = torch.get_rng_state()
    with pytest.raises(KeyError), environment.preserved_random_state(CPU):
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_launcher_tells_size_and_rank(monkeypatch):
    for name, number in environment.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(number, raising=False)
    assert environment.launcher() is None
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert environment.launcher() is None  # one of two
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    assert environment.launcher() == (4, 3)
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", "1")
    assert environment.launcher() == (2, 1)


def test_events_add_up():
    events = Events()
    for _ in range(2):
        with events.timed("sleep"):
            time.sleep(0.01)
    with pytest.raises(KeyError), events.timed("sleep"):
        raise KeyError
    assert events.totals["sleep"].calls == 3 and 0.02 <= events.totals["sleep"].seconds < 1.0
    events.message("sum", 8)
    events.message("sum", 4)
    assert (events.operations["sum"].messages, events.operations["sum"].bytes) == (2, 12)
    events.count_work(10, 0.5, 1.0 / 3.0)
    assert events.work == pytest.approx(5.0 / 3.0)
