"""How long work on a GPU takes: calls captured as graphs, over weights that no cache holds, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fewbits.errors import FewbitsError

Work = Callable[[], object]
LEAST_SECONDS = 1e-3  # of a measurement: a graph is replayed until then
CACHES = 4  # times the level 2 cache that weights rotate over


class Timed(NamedTuple):
    seconds: float  # of a call
    graphed: bool  # whether it was captured: work that cannot be is launched call by call


def medians(rounds: Sequence[Sequence[Work]], device: torch.device, repeats: int = 7) -> list[Timed]:
    """The median call of each round of calls. Every round is one graph; the graphs take turns.

    Without a GPU calls are made one by one, which says nothing of any GPU.

    Raises:
        FewbitsError: a GPU of another kind than torch captures graphs on.
    """
    if device.type == "cpu":
        return [Timed(_once(calls) / len(calls), False) for calls in rounds]
    if device.type != "cuda":
        raise FewbitsError(f"no timing on {device}: its work is not captured as a graph")
    with torch.cuda.device(device):
        replays = [_Replay(calls) for calls in rounds]
        taken: list[list[float]] = [[] for _ in replays]
        for _ in range(repeats):
            for seconds, replay in zip(taken, replays, strict=True):
                seconds.append(replay.seconds())
        return [Timed(statistics.median(s) / len(r.calls), r.graph is not None)
                for s, r in zip(taken, replays, strict=True)]


def cache_bytes(device: torch.device) -> int:
    """Of the level 2 cache."""
    return 0 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).L2_cache_size)


def rotation(nbytes: int, device: torch.device) -> int:
    """How many weights of so many bytes no cache holds."""
    return -(-CACHES * cache_bytes(device) // nbytes) + 1


class _Replay:
    """A round of calls as one graph, replayed as often as a measurement needs."""

    def __init__(self, calls: Sequence[Work]):
        self.calls = calls
        for call in calls:  # kernels are compiled, and what is prepared at the first call is
            call()
        torch.cuda.synchronize()
        self.graph: Any = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                for call in calls:
                    call()
        except RuntimeError:  # it waits for the GPU within a call, or launches to a stream of its own
            torch.cuda.synchronize()
            self.graph = None
        self.times = 1
        self.times = max(1, round(LEAST_SECONDS / self.seconds()))

    def seconds(self) -> float:
        """Of one round. Another goes before: the measured ones wait in the queue while it runs."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._run()
        begin.record()
        for _ in range(self.times):
            self._run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / self.times

    def _run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            for call in self.calls:
                call()


def _once(calls: Sequence[Work]) -> float:
    began = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - began
