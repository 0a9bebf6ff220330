"""What a model file says of itself, from its header alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewbits import containers, hub
from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
LONGEST = 8  # values of a list that are shown


@dataclass(frozen=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]
    codec: str
    nbytes: int


@dataclass(frozen=True)
class CodecInfo:
    """All tensors of one codec together."""

    codec: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Info:
    """A model as its files describe it. Bits per weight count all tensors, and only them."""

    path: Path
    container: str
    architecture: str
    parameters: int
    nbytes: int  # of all its files
    tensor_bytes: int
    bits_per_weight: float
    codecs: list[CodecInfo]  # the largest first
    tensors: list[TensorInfo]
    metadata: dict[str, Any]
    tokenizer: bool
    chat_template: bool

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def inspect(model: str | Path | Checkpoint) -> Info:
    """Describe `model`, a path in any format or a hub id. No tensor is read, torch isn't imported.

    Raises:
        FewbitsError: nothing readable there.
    """
    cp = model if isinstance(model, Checkpoint) else _open(hub.locate(model))
    tensors = [TensorInfo(e.name, e.shape, e.codec.name, e.nbytes) for e in cp.entries.values()]
    groups = [CodecInfo(name, count, sum(e.parameters for e in cp.entries.values() if e.codec.name == name),
                        sum(t.nbytes for t in tensors if t.codec == name))
              for name, count in Counter(t.codec for t in tensors).items()]
    return Info(path=cp.path, container=cp.container, architecture=cp.architecture, parameters=cp.parameters,
                nbytes=sum(map(size_on_disk, cp.facts.get("parts") or [cp.path])), tensor_bytes=cp.nbytes,
                bits_per_weight=cp.nbytes * 8 / max(1, cp.parameters),
                codecs=sorted(groups, key=lambda g: -g.nbytes), tensors=tensors, metadata=_metadata(cp),
                tokenizer=any(name in cp.files for name in TOKENIZERS) or _has_tokens(cp),
                chat_template=_has_template(cp))


def _open(path: Path) -> Checkpoint:
    """Any model, and a GGUF file of an architecture that there is no table for."""
    try:
        return containers.open(path)
    except FewbitsError:
        from fewbits.containers import gguf

        found = gguf.bare(path) if containers.by_name("gguf").detect(path) else None
        if found is None:
            raise
        return found


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of the files right in a directory."""
    files = [f for f in path.iterdir() if f.is_file()] if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files)


def _metadata(cp: Checkpoint) -> dict[str, Any]:
    """The file's own metadata where it has any, else its configuration; long lists by their length."""
    own = cp.facts.get("metadata")
    found = {k: v.value for k, v in own.items()} if own else dict(cp.config)
    found |= {k: v for k, v in cp.facts.items() if k not in ("metadata", "name")}
    return {k: _short(v) for k, v in found.items()}


def _short(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool, dict)) or value is None:
        return value
    if isinstance(value, Sequence) or hasattr(value, "tolist"):
        return f"{len(value)} values" if len(value) > LONGEST else list(map(_short, value))
    return str(value)


def _has_tokens(cp: Checkpoint) -> bool:
    return "tokenizer.ggml.tokens" in (cp.facts.get("metadata") or {})


def _has_template(cp: Checkpoint) -> bool:
    if any(key.startswith("tokenizer.chat_template") for key in cp.facts.get("metadata") or {}):
        return True
    if {"chat_template.jinja", "chat_template.json"} & set(cp.files):
        return True
    if cp.facts.get("metadata") is not None or "tokenizer_config.json" not in cp.files:
        return False
    return bool(json.loads(cp.files["tokenizer_config.json"]).get("chat_template"))
