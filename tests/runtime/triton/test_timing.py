"""Rounds of calls are captured, take turns, and the median counts: on a GPU and by a clock of the tests' own."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.runtime.triton import timing

GPU = torch.device("cuda", 0)
LAUNCH = 40.0  # milliseconds that a call takes longer outside of a graph


class Machine:
    """Time goes by when something is computed; while a graph is captured, calls only go into it."""

    def __init__(self):
        self.now, self.captured, self.done = 0.0, None, []

    def work(self, name: str, milliseconds: list[float] | float, waits: bool = False):
        """A call; of a list every use takes the next entry, the last for all that follow."""
        costs = [milliseconds] if isinstance(milliseconds, float) else milliseconds

        def compute() -> None:
            self.done.append(name)
            self.now += costs.pop(0) if len(costs) > 1 else costs[0]

        def call() -> None:
            if self.captured is None:
                compute()
                self.now += LAUNCH
            elif waits:
                raise RuntimeError("operation not permitted when stream is capturing")
            else:
                self.captured.append(compute)

        return call

    @contextmanager
    def graph(self, made):
        self.captured = made.calls
        try:
            yield
        finally:
            self.captured = None

    def CUDAGraph(self):
        calls = []
        return SimpleNamespace(calls=calls, replay=lambda: [compute() for compute in calls])

    def Event(self, enable_timing):
        event = SimpleNamespace(at=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: end.at - event.at
        return event


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    for name in ("graph", "CUDAGraph", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(L2_cache_size=50 << 20))
    return made


def test_a_call_takes_its_part_of_a_graph_without_launches(machine):
    one, two = timing.medians([[machine.work("a", 4.0)] * 3, [machine.work("b", 1.0), machine.work("c", 3.0)]], GPU)
    assert one == (pytest.approx(4e-3), True) and two == (pytest.approx(2e-3), True)


def test_short_graphs_are_replayed_until_they_can_be_measured(machine):
    found, = timing.medians([[machine.work("a", 0.01)]], GPU, repeats=2)
    assert found.seconds == pytest.approx(1e-5)
    assert machine.done.count("a") == 1 + 2 + 2 * 101  # compiled, measured for its length, replayed behind another


def test_graphs_take_turns_and_a_slow_moment_does_not_count(machine):
    slow = [1.0] * 5 + [500.0, 1.0]
    a, _ = timing.medians([[machine.work("a", slow)], [machine.work("b", 1.0)]], GPU, repeats=3)
    assert a.seconds == pytest.approx(1e-3)
    assert machine.done[-12:] == list("aabb") * 3


def test_what_cannot_be_captured_is_launched_and_told(machine):
    found, = timing.medians([[machine.work("a", 2.0, waits=True)] * 2], GPU)
    assert found == (pytest.approx((2 + LAUNCH) * 1e-3), False)


def test_weights_that_no_cache_holds(machine):
    for nbytes in (1 << 20, 30 << 20, 500 << 20):
        count = timing.rotation(nbytes, GPU)
        assert count >= 2 and count * nbytes > 4 * (50 << 20) and (count == 2 or (count - 2) * nbytes < 4 * (50 << 20))
    assert timing.rotation(1 << 20, torch.device("cpu")) == 1


def test_without_a_gpu_every_call_is_made_once():
    done = []
    found = timing.medians([[lambda: done.append(1), lambda: done.append(2)], [lambda: done.append(3)]],
                           torch.device("cpu"))
    assert done == [1, 2, 3] and all(t.seconds >= 0 and not t.graphed for t in found)
    with pytest.raises(FewbitsError, match="no timing on xpu"):
        timing.medians([], torch.device("xpu"))
