"""Mixture-of-experts layers: directories hold a tensor an expert, checkpoints one `[experts, out, in]` a projection.

`x.experts.0.w1.weight`, `x.experts.1.w1.weight`, … become `x.experts.w1.weight`, and apart again on writing. Nothing is
loaded for that. Experts stay apart where they differ in shape or codec, and where the codec cannot stack them.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass

from fewbits.checkpoint import Entry
from fewbits.codecs.base import Shape
from fewbits.errors import FewbitsError
from fewbits.lazy import torch
from fewbits.qtensor import QTensor
from fewbits.stored import Stored, join

NUMBER = "(0|[1-9][0-9]{0,5})"
ONE = re.compile(rf"(.+\.experts)\.{NUMBER}\.([^.]+\.(?:weight|bias))")
ALL = re.compile(r"(.+\.experts)\.([^.]+\.(?:weight|bias))")


# stacking -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stack:
    """Loads experts into one tensor."""

    parts: tuple[Entry, ...]

    def __call__(self) -> QTensor:
        return stack([part.load() for part in self.parts])

    def stored(self) -> Stored | None:
        found = [part.stored() for part in self.parts]
        whole = [s for s in found if isinstance(s, Stored)]
        return join(whole) if len(whole) == len(found) else None


def stack(tensors: list[QTensor]) -> QTensor:
    """Tensors of one shape and codec as `[count, *shape]`, still packed; column orders are kept, one an expert."""
    first = tensors[0]
    planes = {k: torch.cat([t.planes[k] for t in tensors]) for k in first.planes}
    order = None
    if any(t.order is not None for t in tensors):
        plain = torch.arange(first.shape[-1])
        order = torch.stack([plain if t.order is None else t.order for t in tensors])
    return QTensor(first.codec, (len(tensors), *first.shape), planes, order)


def stacked(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The entries with experts stacked, each stack in the place of its first expert.

    Raises:
        FewbitsError: an expert is missing among its neighbours.
    """
    found: dict[str, dict[int, Entry]] = {}
    for entry in entries.values():
        match = ONE.fullmatch(entry.name)
        if match:
            found.setdefault(stack_of(entry.name), {})[int(match[2])] = entry
    owner: dict[str, Entry | None] = {}  # an expert's name -> its stack, or None where the stack stands already
    for name, parts in found.items():
        missing = next((i for i in range(len(parts)) if i not in parts), None)
        if missing is not None:
            raise FewbitsError(f"{one(name, missing)} is missing, where there is {parts[max(parts)].name}")
        whole = _whole(name, [parts[i] for i in range(len(parts))])
        if whole is not None:
            owner |= dict.fromkeys((e.name for e in parts.values()), None)
            owner[next(iter(parts.values())).name] = whole
    kept = [owner.get(name, entry) for name, entry in entries.items()]
    return {e.name: e for e in kept if e is not None}


def _whole(name: str, parts: list[Entry]) -> Entry | None:
    first = parts[0]
    shape = (len(parts), *first.shape)
    alike = all(p.shape == first.shape and p.codec == first.codec for p in parts)
    if not alike or not splits(name, shape) or not first.codec.stacks(shape):
        return None
    return Entry(name, shape, first.codec, Stack(tuple(parts)))


# unstacking ---------------------------------------------------------------------------------------------------------
class _Held:
    """The stack loaded last: its experts follow each other, and it should not be loaded once for each."""

    def __init__(self) -> None:
        self.entry: Entry | None = None
        self.tensor: QTensor | None = None

    def load(self, entry: Entry) -> QTensor:
        if self.entry is not entry or self.tensor is None:
            self.tensor = None  # let go of one before loading the next
            self.entry, self.tensor = entry, entry.load()
        return self.tensor


@dataclass(frozen=True)
class _Slice:
    """Loads one expert of a stack."""

    held: _Held
    whole: Entry
    index: int

    def __call__(self) -> QTensor:
        return expert(self.held.load(self.whole), self.index)


def expert(tensor: QTensor, index: int) -> QTensor:
    """One expert of a stack, still packed."""
    count = tensor.shape[0]
    planes = {}
    for key, plane in tensor.planes.items():
        step = len(plane) // count
        planes[key] = plane[index * step:(index + 1) * step]
    order = None if tensor.order is None else tensor.order[index]
    return QTensor(tensor.codec, tensor.shape[1:], planes, order)


def one(name: str, index: int) -> str:
    """What expert `index` of the stack `name` is called."""
    match = ALL.fullmatch(name)
    assert match is not None, name
    return f"{match[1]}.{index}.{match[2]}"


def stack_of(name: str) -> str:
    """The name of the stack that an expert belongs to; of everything else its own."""
    match = ONE.fullmatch(name)
    return f"{match[1]}.{match[3]}" if match else name


def splits(name: str, shape: Shape) -> bool:
    """Whether an entry is a stack that files hold apart."""
    return ALL.fullmatch(name) is not None and len(shape) == (3 if name.endswith(".weight") else 2)


def unstacked(entries: Iterable[Entry], but: Container[str] = ()) -> dict[str, Entry]:
    """The entries with every expert apart; those of the names `but` as they are.

    Raises:
        FewbitsError: the codec's blocks go over the ends of experts.
    """
    held = _Held()
    parts = ([entry] if entry.name in but else _parts(entry, held) for entry in entries)
    return {part.name: part for found in parts for part in found}


def _parts(entry: Entry, held: _Held) -> list[Entry]:
    if not splits(entry.name, entry.shape):
        return [entry]
    if isinstance(entry.load, Stack) and entry.load.parts[0].codec == entry.codec:
        return [part.as_(name=one(entry.name, i)) for i, part in enumerate(entry.load.parts)]
    if not entry.codec.stacks(entry.shape):
        raise FewbitsError(f"{entry.name} {list(entry.shape)} does not come apart into experts: blocks of "
                           f"{entry.codec.name} go over their ends")
    return [Entry(one(entry.name, i), entry.shape[1:], entry.codec, _Slice(held, entry, i))
            for i in range(entry.shape[0])]
