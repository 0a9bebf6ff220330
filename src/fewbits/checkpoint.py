"""A model as files hold it: configuration, lazily loaded tensors under their Transformers names, tokenizer files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fewbits.codecs.base import Codec, Shape
from fewbits.lazy import torch
from fewbits.qtensor import QTensor
from fewbits.stored import Apart, Stored


@dataclass(frozen=True)
class Entry:
    """One tensor: what its file says of it, and how to get it."""

    name: str
    shape: Shape
    codec: Codec
    load: Callable[[], QTensor]

    @property
    def nbytes(self) -> int:
        return self.codec.nbytes(self.shape)

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    def as_(self, **changes: Any) -> Entry:
        return replace(self, **changes)

    def stored(self) -> Stored | Apart | None:
        """Where its bytes lie, if what loads it knows that."""
        find = getattr(self.load, "stored", None)
        return None if find is None else find()


@dataclass(frozen=True)
class Filed:
    """Loads a tensor, and says where its bytes lie in a file."""

    load: Callable[[], QTensor]
    stored: Callable[[], Stored | Apart | None]

    def __call__(self) -> QTensor:
        return self.load()


@dataclass(frozen=True)
class Buffer:
    """A tensor that is no weight (integers, a scalar): carried from directory to directory as it is."""

    dtype: str  # as safetensors names it
    shape: Shape
    load: Callable[[], torch.Tensor]


@dataclass
class Checkpoint:
    """A model in any container. Names and orientation are those of Transformers' `state_dict` ([out, in])."""

    path: Path
    container: str  # name of the container it came from
    config: dict[str, Any]  # config.json without a quantization_config
    entries: dict[str, Entry]
    files: dict[str, bytes] = field(default_factory=dict)  # tokenizer.json, generation_config.json, …
    facts: dict[str, Any] = field(default_factory=dict)  # what else the file says of itself, for `info`
    buffers: dict[str, Buffer] = field(default_factory=dict)  # position ids and the like

    def __deepcopy__(self, memo: dict[int, Any]) -> Checkpoint:
        """Itself: nothing changes a checkpoint, and mapped files cannot be copied. Models that hold one can."""
        return self

    @property
    def architecture(self) -> str:
        return (self.config.get("architectures") or [self.config.get("model_type", "unknown")])[0]

    @property
    def parameters(self) -> int:
        return sum(e.parameters for e in self.entries.values())

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self.entries.values())
