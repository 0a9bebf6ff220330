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
from fewbits.stored import Stored


@dataclass(frozen=True)
class Entry:
    """One tensor: what its file says of it, and how to get it; `stored` says where its bytes lie, if they are the
    tensor's as they are."""

    name: str
    shape: Shape
    codec: Codec
    load: Callable[[], QTensor]
    stored: Callable[[], Stored | None] = lambda: None

    @property
    def nbytes(self) -> int:
        return self.codec.nbytes(self.shape)

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    def as_(self, **changes: Any) -> Entry:
        """The same but for `changes`; another name alone leaves the tensor what it is in the file."""
        other = changes.keys() - {"name"}
        return replace(self, **({"stored": lambda: None} if other else {}) | changes)


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

    @property
    def architecture(self) -> str:
        return (self.config.get("architectures") or [self.config.get("model_type", "unknown")])[0]

    @property
    def parameters(self) -> int:
        return sum(e.parameters for e in self.entries.values())

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self.entries.values())
