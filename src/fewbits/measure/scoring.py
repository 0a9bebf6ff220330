"""Logits over windows of tokens, some rows at a time, from the native decoder or from Transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fewbits import _native, containers, hub
from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError
from fewbits.instructions import threads
from fewbits.runtime import decoder, engine
from fewbits.runtime.sequences import Array, Decoder

ROWS = 128  # tokens whose logits are there at a time


def spans(first: int, last: int) -> list[slice]:
    """Positions from `first` to before `last`, up to ROWS at a time."""
    return [slice(at, min(at + ROWS, last)) for at in range(first, last, ROWS)]


class Scorer(Protocol):
    """A model that is measured."""

    checkpoint: Checkpoint
    kernel: str  # what computes, in words

    def logits(self, window: torch.Tensor, pieces: list[slice]) -> Iterator[Array]:
        """After the tokens of `window` `[tokens]` in each piece, of up to ROWS: float32 `[piece, vocabulary]`.

        Each is overwritten by the next.
        """


class Decoded:
    """On the decoder of the CPU, or of a GPU."""

    def __init__(self, checkpoint: Checkpoint, model: Decoder):
        self.checkpoint, self.model, self.kernel = checkpoint, model, model.engine.name
        self._room = np.empty((ROWS, model.vocabulary), np.float32)

    def states(self, window: torch.Tensor) -> Array:
        """Last hidden states, `[tokens, hidden]`."""
        return self.model.step([(self.model.sequence(len(window)), window.tolist(), len(window))], states=True)[0]

    def head(self, states: Array) -> Array:
        """Logits of up to ROWS of them; overwritten by the next call."""
        return self.model.head(states, self._room[:len(states)])

    def logits(self, window: torch.Tensor, pieces: list[slice]) -> Iterator[Array]:
        states = self.states(window)
        return (self.head(states[rows]) for rows in pieces)


class Transformed:
    """A model of Transformers."""

    def __init__(self, model: Any, kernel: str | None = None):
        from fewbits.loading import checkpoint_of

        self.checkpoint, self.model = checkpoint_of(model), model
        self.kernel = f"Transformers, {kernel}" if kernel else "Transformers"

    def logits(self, window: torch.Tensor, pieces: list[slice]) -> Iterator[Array]:
        with torch.inference_mode():
            found = self.model(input_ids=window[None].to(self.model.device), use_cache=False).logits[0]
        return (found[rows].float().cpu().numpy() for rows in pieces)


def scorer(model: str | Path | Checkpoint | Any, kernel: str | None = None, device: str | None = None) -> Scorer:
    """What computes `model`: a path, a hub id or a checkpoint goes to the decoder, of a GPU if `device` names one, if
    that knows its family and no kernel was asked for, else to Transformers, as stderr says; a loaded model is taken as
    it is.

    Raises:
        FewbitsError: nothing readable there, tensors missing or misshapen; a GPU that cannot do it.
    """
    from fewbits.loading import load

    if not isinstance(model, (str, Path, Checkpoint)):
        return Transformed(model)
    checkpoint = model if isinstance(model, Checkpoint) else containers.open(hub.locate(model))
    made = decoder.compile_or_say(checkpoint, device) if kernel is None else None
    if made is not None:
        return Decoded(checkpoint, made)
    return Transformed(engine.placed(device, lambda where: load(checkpoint, kernel=kernel, device=where)), kernel)


def log_sums(logits: Array, source: Checkpoint) -> tuple[Array, Array]:
    """Of every row the natural logarithm of the sum of exponentials (float64), and the most likely token.

    Raises:
        FewbitsError: some are NaN or infinite; the model is named.
    """
    sums, tops = np.empty(len(logits)), np.empty(len(logits), np.int64)
    _native.log_sums(logits, sums, tops, threads())
    if not np.isfinite(sums).all():
        raise FewbitsError(f"{source.path}: logits are NaN or infinite",
                           "the model is broken: fewbits verify says where")
    return sums, tops


def divergences(p: Array, p_sums: Array, q: Array, q_sums: Array) -> Array:
    """Kullback-Leibler divergence of `q` from `p` for every row of logits, nats, float64."""
    out = np.empty(len(p))
    _native.divergences(p, p_sums, q, q_sums, out, threads())
    return out
