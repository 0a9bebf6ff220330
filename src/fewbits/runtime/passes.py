"""Passes of a module over batches that stop where a layer reads, and go on from there when its weight has changed."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from fewbits.runtime.taps import Key, Reading, tapped


class _Thread(greenlet):
    """Code of a pass, with a stack of its own."""


def _stop(reading: Reading) -> None:
    """Hands a reading out of the pass that runs; other calls of a tapped module go on."""
    current = getcurrent()
    if isinstance(current, _Thread) and current.parent is not None:
        current.parent.switch(reading)


class Run:
    """One batch on its way through a module."""

    def __init__(self, module: nn.Module, x: torch.Tensor, arguments: dict[str, Any]):
        self._thread = _Thread(lambda: output(module, x, arguments))
        self.behind: set[Key] = set()  # layers that have run
        self.at: Reading | None = None  # what the layer reads that is to run next
        self.output: torch.Tensor | None = None

    def go(self) -> Reading | None:
        """On to the next reading, or to the end."""
        if self.at:
            self.behind.add(self.at.key)
        self.at = None
        with torch.no_grad():
            found = self._thread.switch()
        if self._thread.dead:
            self.output = found
        else:
            self.at = found
        return self.at

    def has_reached(self, keys: set[Key]) -> bool:
        return bool(self.behind & keys) or (self.at is not None and self.at.key in keys)

    def close(self) -> None:
        if not self._thread.dead:
            self._thread.throw()


@dataclass
class Passes:
    """A module, what it is called with, a batch each, and the passes that have stopped on their way."""

    module: nn.Module
    inputs: list[torch.Tensor]
    arguments: list[dict[str, Any]]
    wait: bool = True  # whether there is memory for all batches to stop half-way; else each begins anew
    stopped: dict[int, Run] = field(default_factory=dict)
    _taps: ExitStack = field(default_factory=ExitStack)

    def readings(self, number: int, keys: set[Key], calls: int = -1) -> list[Reading]:
        """What the layers `keys` read on one batch, `calls` times together (-1: as often as they do).

        After a single one the pass waits before that layer runs.
        """
        run = self.stopped.pop(number, None)
        if run is None or run.has_reached(keys):
            run = self._begin(number, run)
        found: list[Reading] = []
        while len(found) != calls and (reading := run.go()):
            if reading.key in keys:
                found.append(reading)
        if self.wait and calls == 1 and run.at:
            self.stopped[number] = run
        else:
            run.close()
        self._untap()
        return found

    def changed(self, key: Key | None) -> None:
        """Passes that have used the weight `key` (None: all) were with the old one: they are dropped."""
        for number, run in list(self.stopped.items()):
            if key is None or key in run.behind:
                self.stopped.pop(number).close()
        self._untap()

    def finish(self, number: int) -> torch.Tensor:
        """What the module puts out for a batch, from where its pass has stopped."""
        run = self.stopped.pop(number, None)
        if run is None:
            with torch.no_grad():
                return self.output(number)
        while run.go():
            pass
        self._untap()
        assert run.output is not None
        return run.output

    def output(self, number: int) -> torch.Tensor:
        """What the module puts out for a batch, with a gradient where that is on."""
        return output(self.module, self.inputs[number], self.arguments[number])

    def _begin(self, number: int, old: Run | None) -> Run:
        if old:
            old.close()
        if not self.stopped:
            self._taps.enter_context(tapped(self.module, _stop))
        return Run(self.module, self.inputs[number], self.arguments[number])

    def _untap(self) -> None:
        if not self.stopped:
            self._taps.close()


def output(module: nn.Module, x: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    y = module(x, **arguments)
    return y[0] if isinstance(y, (tuple, list)) else y
