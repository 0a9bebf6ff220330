"""Logits over windows of tokens, some rows at a time, from the native decoder or from Transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from fewbits import containers, hub
from fewbits.checkpoint import Checkpoint
from fewbits.runtime import decoder
from fewbits.runtime.sequences import Decoder

ROWS = 128  # tokens whose logits are there at a time


class Scorer(Protocol):
    """A model that is measured."""

    checkpoint: Checkpoint

    def logits(self, window: torch.Tensor) -> Iterator[torch.Tensor]:
        """After each token of `window` `[tokens]`: float32 `[ROWS, vocabulary]`, the last with what is left."""


class Decoded:
    """On the native decoder."""

    def __init__(self, checkpoint: Checkpoint, model: Decoder):
        self.checkpoint, self.model = checkpoint, model

    def logits(self, window: torch.Tensor) -> Iterator[torch.Tensor]:
        sequence, tokens = self.model.sequence(len(window)), window.tolist()
        for at in range(0, len(tokens), ROWS):
            yield torch.from_numpy(sequence.append(tokens[at:at + ROWS], last_only=False))


class Transformed:
    """A model of Transformers."""

    def __init__(self, model: Any):
        from fewbits.loading import checkpoint_of

        self.checkpoint, self.model = checkpoint_of(model), model

    def logits(self, window: torch.Tensor) -> Iterator[torch.Tensor]:
        with torch.inference_mode():
            found = self.model(input_ids=window[None], use_cache=False).logits[0]
        for at in range(0, len(found), ROWS):
            yield found[at:at + ROWS].float()


def scorer(model: str | Path | Checkpoint | Any, kernel: str | None = None) -> Scorer:
    """What computes `model`: a path, a hub id or a checkpoint goes to the native decoder if that knows its family and
    no kernel was asked for, else to Transformers, as stderr says; a loaded model is taken as it is.

    Raises:
        FewbitsError: nothing readable there, tensors missing or misshapen.
    """
    from fewbits.loading import load

    if not isinstance(model, (str, Path, Checkpoint)):
        return Transformed(model)
    checkpoint = model if isinstance(model, Checkpoint) else containers.open(hub.locate(model))
    made = decoder.compile_or_say(checkpoint) if kernel is None else None
    if made is not None:
        return Decoded(checkpoint, made)
    return Transformed(load(checkpoint, kernel=kernel))
