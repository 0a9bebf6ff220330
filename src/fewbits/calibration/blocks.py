"""A block of the walk: what its layers read, group by group, while its weights are quantized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from fewbits.calibration.statistics import Experts, Found, Statistics
from fewbits.checkpoint import Entry
from fewbits.devices import free_bytes
from fewbits.errors import FewbitsError
from fewbits.lazy import torch

if TYPE_CHECKING:
    from fewbits.calibration.walk import Walk
    from fewbits.qtensor import QTensor
    from fewbits.runtime.passes import Passes
    from fewbits.runtime.taps import Key, Reading


HALFWAY = 0.1  # of the free memory, for what the layers of a block read: what passes hold that stop in it is about that


@dataclass
class Block:
    """One block of the walk, its weights in memory."""

    index: int
    prefix: str
    names: list[str]  # of its entries in the checkpoint
    passes: Passes
    walk: Walk
    original: Passes | None = None  # of the block as it was, on the activations that the original model brings to it
    calls: Counter[Key] = field(default_factory=Counter)  # of each layer in one pass

    def groups(self, sequential: bool | None = None) -> Iterator[Group]:
        """The block's entries in the order in which its layers run, those together that read the same tensor.

        The first group holds what no linear layer reads: norms, biases. If not `sequential`, one group holds all.
        """
        readers = self._readers()
        members = [[name for key in keys for name, _ in self.entries[key]] for keys in readers]
        rest = [n for n in self.names if not any(n in m for m in members)]
        if not (self.walk.sequential if sequential is None else sequential):
            yield Group(self, self.names, readers)
            return
        yield Group(self, rest, [])
        for names, keys in zip(members, readers, strict=True):
            yield Group(self, names, [keys])

    def statistics(self) -> dict[str, Found]:
        """Weight name -> statistics of its layer's inputs; layers that read the same tensor share theirs."""
        return next(self.groups(sequential=False)).statistics()

    def replace(self, name: str, q: QTensor) -> None:
        """Put the decoded `q` in the place of the block's own weight."""
        place = self.walk.places.put(Entry(name, q.shape, q.codec, lambda: q), torch.float32)
        key = (place.module, place.leaf)
        self.passes.changed(key if key in self.calls else None)

    def run(self) -> list[torch.Tensor]:
        """What the block puts out for each batch."""
        return [self.passes.finish(number) for number in range(len(self.passes.inputs))]

    def advance(self) -> None:
        """Put the block's outputs in the place of its inputs."""
        for passes in (self.passes, self.original) if self.original else (self.passes,):
            for number in range(len(passes.inputs)):
                passes.inputs[number] = passes.finish(number)

    def _readers(self) -> list[list[Key]]:
        """Keys of the layers in the order in which they run on the first batch, by the tensor that they read."""
        found: dict[tuple[int, bool], list[Key]] = {}
        self.calls.clear()
        # as long as they are held, ids of tensors are their own
        readings = self.passes.readings(0, set(self.entries))
        read = {id(r.source): r.x.nbytes for r in readings}
        for passes in (self.passes, self.original) if self.original else (self.passes,):
            passes.wait = sum(read.values()) * len(passes.inputs) < free_bytes(self.walk.device) * HALFWAY
        for reading in readings:
            self.calls[reading.key] += 1
            if self.calls[reading.key] == 1:
                found.setdefault((id(reading.source), reading.tokens is None), []).append(reading.key)
        return list(found.values())

    @cached_property
    def entries(self) -> dict[Key, list[tuple[str, int | None]]]:
        """A parameter -> the entries that fill it, and which expert each is."""
        found: dict[Key, list[tuple[str, int | None]]] = {}
        for name in self.names:
            place = self.walk.places.of(self.walk.checkpoint.entries[name])
            found.setdefault((place.module, place.leaf), []).append((name, place.expert))
        return found


@dataclass
class Group:
    """Entries of a block whose statistics are collected together."""

    block: Block
    names: list[str]
    readers: list[list[Key]]  # layers that read the same tensor

    def statistics(self) -> dict[str, Found]:
        """Weight name -> statistics of its layer's inputs; norms, biases and layers that nothing reached have none.

        Raises:
            FewbitsError: activations that are not finite; the layer is named.
        """
        walk, block = self.block.walk, self.block
        seen: dict[Key, Found] = {}  # by the first of each readers
        for number in range(len(block.passes.inputs) if self.readers else 0):
            self._collect(number, seen)
        found: dict[str, Found] = {}
        for keys in self.readers:
            statistics = seen[keys[0]]
            if walk.combine:
                walk.combine(statistics)
            if isinstance(statistics, Experts) and keys[0][1] != "down_proj":
                walk.thin[block.prefix] = statistics.few, len(statistics.parts)
            for name, expert in (pair for key in keys for pair in block.entries[key]):
                found[name] = statistics if expert is None else statistics.expert(expert)
        return found

    def _collect(self, number: int, seen: dict[Key, Found]) -> None:
        """Take in what the layers read on one batch."""
        block, walk = self.block, self.block.walk
        first = {keys[0] for keys in self.readers}
        calls = sum(block.calls[key] for key in first)
        readings = block.passes.readings(number, first, calls)
        originals: list[Reading | None] = [None] * len(readings)
        if block.original:
            twins = dict(zip(block.passes.module.modules(), block.original.module.modules(), strict=True))
            originals = [*block.original.readings(number, {(twins[module], leaf) for module, leaf in first}, calls)]
        keep = walk.mask(block.prefix, number)
        for reading, original in zip(readings, originals, strict=True):
            if not bool(reading.x.isfinite().all()):
                raise FewbitsError(f"activations entering {block.entries[reading.key][0][0]} are not finite",
                                   "is the source model intact?")
            if keep is not None and reading.total == len(keep):
                reading, original = reading.only(keep), original and original.only(keep)
            rows = None if original is None else reading.matched(original)
            if reading.key not in seen:
                width, drift = reading.x.shape[-1], rows is not None
                seen[reading.key] = (Experts(len(reading.counts), width, drift, walk.device) if reading.counts else
                                     Statistics.zeros(width, drift, walk.device))
            seen[reading.key].add(reading.x, rows, reading.counts)
