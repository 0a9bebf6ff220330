"""What a reference says of windows of text. Its last hidden states are kept on disk, and only its head computes again:
the same logits bit by bit, for the bytes of a hidden state a token.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol
from zipfile import BadZipFile

import numpy as np
import torch

import fewbits
from fewbits import caching, instructions
from fewbits.measure.circumstances import identity
from fewbits.measure.scoring import Decoded, Scorer, log_sums, spans
from fewbits.measure.windows import digest
from fewbits.runtime.sequences import Array


@dataclass(frozen=True)
class Said:
    """Of one window: of every predicted token its negative log-likelihood and the most likely one in its place; from
    `first` on also the log-sums of logits and what logits come from.
    """

    losses: Array  # [context - 1], float64, nats
    tops: Array  # [context - 1]
    sums: Array  # [context - 1 - first]
    states: Array  # [context - 1 - first, hidden or vocabulary], float32


class Reference(Protocol):
    @property
    def scorer(self) -> Scorer: ...

    def window(self, i: int) -> Said: ...

    def logits(self, states: Array) -> Array:
        """Of up to ROWS states of a window."""


def reference(scorer: Scorer, windows: torch.Tensor, first: int) -> Reference:
    """What `scorer`'s model says from position `first` of every window on: kept if the native decoder runs it."""
    if isinstance(scorer, Decoded) and identity(scorer.checkpoint)["sha256"]:
        return Kept(scorer, windows, first)
    return Computed(scorer, windows, first)


class Computed:
    """A reference that computes every time."""

    def __init__(self, scorer: Scorer, windows: torch.Tensor, first: int):
        self.scorer, self.windows, self.first = scorer, windows, first

    def window(self, i: int) -> Said:
        window, last = self.windows[i], len(self.windows[i]) - 1
        rows = [p.copy() for p in self.scorer.logits(window, spans(0, last))]
        return _said(np.concatenate(rows), window[1:].numpy(), self.first, self.scorer)

    def logits(self, states: Array) -> Array:
        return states


class Kept:
    """A reference whose states are in files of the cache, a window each."""

    def __init__(self, scorer: Decoded, windows: torch.Tensor, first: int):
        self.scorer, self.windows, self.first = scorer, windows, first
        known = (identity(scorer.checkpoint)["sha256"], first, fewbits.__version__, instructions.current(),
                 scorer.kernel)
        self.folder = caching.folder("references", hashlib.sha256(repr(known).encode()).hexdigest()[:32])

    def window(self, i: int) -> Said:
        file = self.folder / f"{digest(self.windows[i])[:32]}.npz"
        try:
            with np.load(file) as found:
                return Said(found["losses"], found["tops"], found["sums"], found["states"])
        except (OSError, KeyError, ValueError, BadZipFile):  # not there, or half of it
            said = self._compute(self.windows[i])
        caching.write(file, lambda out: np.savez(out, losses=said.losses, tops=said.tops, sums=said.sums,
                                                 states=said.states))
        return said

    def _compute(self, window: torch.Tensor) -> Said:
        states, targets = self.scorer.states(window)[:-1], window[1:].numpy()
        parts = [_said(self.scorer.head(states[rows]), targets[rows], 0, self.scorer) for rows in spans(0, len(states))]
        losses, tops, sums = (np.concatenate([getattr(p, name) for p in parts]) for name in ("losses", "tops", "sums"))
        return Said(losses, tops, sums[self.first:], states[self.first:])

    def logits(self, states: Array) -> Array:
        return self.scorer.head(states)


def _said(logits: Array, targets: Array, first: int, scorer: Scorer) -> Said:
    sums, tops = log_sums(logits, scorer.checkpoint)
    return Said(sums - logits[np.arange(len(logits)), targets], tops, sums[first:], logits[first:])
