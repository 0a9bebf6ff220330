"""How far variants of one model are from it, on the same tokens: the original speaks once, each variant after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from fewbits.checkpoint import Checkpoint, Entry
from fewbits.measure.references import reference
from fewbits.measure.scoring import divergences, log_sums, scorer, spans
from fewbits.qtensor import QTensor
from fewbits.runtime.sequences import Array


def replaced(source: Checkpoint, tensors: Mapping[str, QTensor]) -> Checkpoint:
    """The source with some of its tensors quantized."""
    def entry(e: Entry) -> Entry:
        q = tensors.get(e.name)
        return e if q is None else e.as_(codec=q.codec, load=lambda: q)

    return replace(source, entries={n: entry(e) for n, e in source.entries.items()})


class Trials:
    """A model and the windows of text that its variants are tried on."""

    def __init__(self, source: Checkpoint, windows: torch.Tensor):
        self.source, self.windows = source, windows
        self._reference = reference(scorer(source), windows, 0)

    @property
    def kernel(self) -> str:
        """What computes the original."""
        return self._reference.scorer.kernel

    @property
    def tokens(self) -> int:
        """Predicted ones."""
        return len(self.windows) * (self.windows.shape[1] - 1)

    def divergence(self, variant: Checkpoint) -> Array:
        """Nats of every predicted token.

        Raises:
            FewbitsError: logits are not finite.
        """
        net, found = scorer(variant), list[Array]()
        for i, window in enumerate(self.windows):
            said, pieces = self._reference.window(i), spans(0, len(window) - 1)
            for rows, logits in zip(pieces, net.logits(window, pieces), strict=True):
                sums, _ = log_sums(logits, variant)
                found.append(divergences(self._reference.logits(said.states[rows]), said.sums[rows], logits, sums))
        return np.concatenate(found)
