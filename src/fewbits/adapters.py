"""Adapters and the checkpoints that they belong to: which tensor each change is for, and the sum, tensor by tensor.

Names in an adapter are those of the model that was trained; files may know a tensor under another, and hold one tensor
for an embedding and the head that is tied to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fewbits import arch
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import Codec
from fewbits.codecs.floats import F16, Float
from fewbits.containers import experts, gguf_lora, peft
from fewbits.containers.peft import Adapter, Change
from fewbits.errors import FewbitsError
from fewbits.lazy import torch
from fewbits.qtensor import QTensor
from fewbits.recipe import ModelFacts
from fewbits.recipe.facts import LINEAR, float_of

LARGEST = 65504  # of float16
ANOTHER = "it belongs to another model, or to one whose vocabulary was resized"


def read(path: Path, base: Checkpoint) -> Adapter:
    """An adapter for the model `base`, from a peft directory or a llama.cpp LoRA file.

    Raises:
        FewbitsError: there is none, or one that adds something else than LoRA does.
    """
    if not gguf_lora.is_adapter(path):
        raise FewbitsError(f"{path}: no adapter", f"a directory of peft's with {peft.CONFIG}, or llama.cpp's file")
    if path.is_dir():
        return peft.read(path)
    lora = gguf_lora.read_lora(path, base.config)
    return Adapter(path, {name: Change(pair) for name, pair in lora.pairs.items()}, lora.base)


def applied(base: Checkpoint, adapter: Adapter, kind: Codec | None = None) -> tuple[Checkpoint, list[str]]:
    """`base` with the adapter's changes in it, and what to say of that. Every sum is made when it is loaded.

    What changes and what was packed becomes floats of type `kind`; without, of its own type, or of the one that the
    configuration names.

    Raises:
        FewbitsError: an adapter of another model: the tensor is named.
    """
    seats, notes = _Seats(base, adapter), list[str]()
    changes: dict[str, Change] = {}
    apart: Entry | None = None  # a head that was tied
    for name, change in adapter.changes.items():
        found = seats.find(name)
        if found in changes:
            raise FewbitsError(f"{adapter.path}: {name}: {found} is changed twice")
        changes[found] = change
    if seats.asks(changes) and seats.tie and (seats.tie.head in changes or seats.tie.embedding in changes):
        apart = _apart(seats, changes)
        if apart is None:
            changes.pop(seats.tie.head)
        else:
            notes.append(f"{seats.tie.head} and {seats.tie.embedding} were one tensor and are two now: the adapter "
                         "changes one of them")
    entries = dict(seats.entries) | ({apart.name: apart} if apart else {})
    for name, entry in entries.items():
        if name in changes:
            entries[name] = seats.changed(entry, changes[name], kind)
        elif not isinstance(entry.codec, Float):
            entries[name] = seats.changed(entry, None, kind)
    path = base.path.with_name(f"{base.path.stem if base.path.is_file() else base.path.name}+{adapter.path.stem}")
    config = _untied(base.config) if apart else base.config
    facts = {k: v for k, v in base.facts.items() if k not in ("file_type", "quantization_config", "recipe")}
    return replace(base, path=path, config=config, facts=facts, entries=experts.stacked(entries)), notes


@dataclass(frozen=True)
class _Tie:
    """Names of an embedding that files hold, and of the head that is the same tensor."""

    embedding: str
    head: str


class _Seats:
    """Finds the tensors that an adapter changes."""

    def __init__(self, base: Checkpoint, adapter: Adapter):
        self.base, self.adapter = base, adapter
        by_one = any(experts.ONE.fullmatch(name) for name in adapter.changes)
        self.entries = experts.unstacked(base.entries.values()) if by_one else base.entries
        self.roles = {f.name: f.role for f in ModelFacts.of(replace(base, entries=self.entries)).tensors}

    def find(self, name: str) -> str:
        """The entry of a parameter, or the head's name where that is tied."""
        if name in self.entries:
            return name
        found = next((self._names[n] for n in self._spellings(name) if n in self._names), None)
        if found is not None:
            return found
        if self.tie and self.tie.head in self._spellings(name):
            return self.tie.head
        raise FewbitsError(f"{self.adapter.path}: changes {name}, which {self.base.path} does not have", ANOTHER)

    def asks(self, changes: Iterable[str]) -> bool:
        """Whether some of the entries named may be an embedding or a head."""
        return any(name not in self.entries or self.roles.get(name) not in LINEAR and len(self.entries[name].shape) > 1
                   for name in changes)

    @cached_property
    def tie(self) -> _Tie | None:
        """None where embedding and head are two tensors, or there is no head."""
        inner, outer = self._net.get_input_embeddings(), self._net.get_output_embeddings()
        called = {module: f"{name}.weight" for name, module in self._net.named_modules()}
        embedding, head = self._names.get(called.get(inner, "")), called.get(outer)
        if outer is None or embedding is None or head is None or head in self._names:
            return None
        return _Tie(embedding, head)

    @cached_property
    def _net(self) -> Any:
        from fewbits.runtime.build import empty_model

        return empty_model(self.base.config, self.base.path)

    @cached_property
    def _places(self) -> Any:
        from fewbits.runtime.places import Places

        return Places(self._net, self.base)

    @cached_property
    def _names(self) -> dict[str, str]:
        """Parameter of the model -> entry."""
        modules = {module: name for name, module in self._net.named_modules()}
        found = {}
        for entry in self.entries.values():
            place = self._places.of(entry)
            if not place.shared:
                found[f"{modules[place.module]}.{place.leaf}".removeprefix(".")] = entry.name
        return found

    def _spellings(self, name: str) -> list[str]:
        """What the model may call a parameter of one with or without a head, or of an older Transformers."""
        prefix = self._net.base_model_prefix + "."
        return [name, prefix + name, name.removeprefix(prefix), self._places.renamed(name)]

    def changed(self, entry: Entry, change: Change | None, kind: Codec | None) -> Entry:
        """The entry in floats, with a change in it. Sums are made upright, `[out, in]`; a module of the `Conv1D` kind
        holds the other way round, and so do files, of floats."""
        lies = self.roles.get(entry.name) == "conv1d"
        packed = not isinstance(entry.codec, Float)
        before = _turned(entry) if lies and not packed else entry
        if change is not None:
            if change.instead is not None and (lies or arch.transposed(self.base.config, entry.name)):
                change = replace(change, instead=peft.transposed(change.instead))
            self._check(before, change)
        codec = kind or (float_of(self.base.config) if packed else entry.codec)
        found = Entry(entry.name, before.shape, codec, partial(_sum, before, change, codec, str(self.adapter.path)))
        return _turned(found) if lies else found

    def _check(self, entry: Entry, change: Change) -> None:
        """Refuse what does not fit."""
        shape = tuple(entry.shape)
        where = f"{self.adapter.path}: {entry.name}:"
        if change.pair is None:
            found = (change.plus or change.instead).shape  # type: ignore[union-attr]
            if tuple(found) != shape:
                raise FewbitsError(f"{where} {list(found)}, and {self.base.path} has {list(shape)}", ANOTHER)
            return
        a, b = change.pair.a.shape, change.pair.b.shape
        if a[0] != b[1]:
            raise FewbitsError(f"{where} A {list(a)} and B {list(b)} have no rank in common", "the adapter is damaged")
        if len(shape) < 2 or (b[0], a[1]) != (shape[0], math.prod(shape[1:])):
            raise FewbitsError(f"{where} A and B of rank {a[0]} make {[b[0], a[1]]}, and {self.base.path} has "
                               f"{list(shape)}", ANOTHER)
        norms = change.magnitude
        if norms is not None and norms.dequantize().numel() != (shape[1] if change.columns else shape[0]):
            raise FewbitsError(f"{where} magnitudes {list(norms.shape)} do not fit {list(shape)}", ANOTHER)


def _apart(seats: _Seats, changes: dict[str, Change]) -> Entry | None:
    """The head as an entry of its own; None where the adapter changes both alike, and one tensor will do."""
    assert seats.tie is not None
    head, embedding = changes.get(seats.tie.head), changes.get(seats.tie.embedding)
    if head is not None and embedding is not None and _alike(head, embedding):
        return None
    entry = seats.entries[seats.tie.embedding]
    return entry.as_(name=seats.tie.head)


def _alike(one: Change, other: Change) -> bool:
    if one.pair and other.pair and one.magnitude is other.magnitude is None:
        return one.pair.scale == other.pair.scale and all(
            torch.equal(p.dequantize(), q.dequantize())
            for p, q in ((one.pair.a, other.pair.a), (one.pair.b, other.pair.b)) if p.shape == q.shape)
    if one.instead and other.instead and one.instead.shape == other.instead.shape:
        return torch.equal(one.instead.dequantize(), other.instead.dequantize())
    return False


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    more = {"text_config": inner | {"tie_word_embeddings": False}} if isinstance(inner, dict) else {}
    return config | more | {"tie_word_embeddings": False}


def _sum(entry: Entry, change: Change | None, codec: Codec, path: str) -> QTensor:
    """Loads an entry in floats, with a change in it.

    Raises:
        FewbitsError: the sum is not finite, or too large for float16.
    """
    weight = entry.load().dequantize()
    found = weight if change is None else change.of(weight)
    most = float(found.abs().max())
    if change is not None and not most < math.inf:
        raise FewbitsError(f"{path}: {entry.name} would hold NaN or infinities", "the adapter is damaged")
    if codec == F16 and most > LARGEST:
        raise FewbitsError(f"{path}: {entry.name} would hold {most:.3g}, float16 ends at {LARGEST}",
                           "merge into another type: --dtype bf16")
    assert isinstance(codec, Float)
    data = found.to(codec.dtype).reshape(codec.matrix(entry.shape)).contiguous()
    return QTensor(codec, entry.shape, {"data": data})


def _turned(entry: Entry) -> Entry:
    """A matrix of floats, turned."""
    return entry.as_(shape=entry.shape[::-1], load=lambda: peft.transposed(entry.load()))
