"""Decoders on a GPU: weights are laid out there for the first kernel that takes them, caches are taken at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fewbits import devices, planning
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.errors import NotHere
from fewbits.memory import gb
from fewbits.qtensor import QTensor
from fewbits.runtime import weights
from fewbits.runtime.dispatch import prepare, prepared_bytes
from fewbits.runtime.reference import Prepared
from fewbits.runtime.triton.joining import floats
from fewbits.runtime.triton.plan import Cache, Plan

ASIDE = 1 << 29  # bytes for what a call computes with


@dataclass(frozen=True)
class Gpu:
    device: torch.device
    dtype: torch.dtype  # of activations, caches and weights that are floats
    kernel: str | None = None  # of products; None: whatever suits
    caches = ("f16",)
    most = 1024

    @property
    def name(self) -> str:
        if self.device.type != "cuda":
            return f"decoder on {self.device}"
        return f"decoder on {torch.cuda.get_device_name(self.device)}"

    def check(self, checkpoint: Checkpoint) -> None:
        needed = ASIDE + sum(self._bytes(entry) for entry in checkpoint.entries.values())
        free = devices.free_bytes(self.device)
        if needed > free:
            fitting = planning.fitting(checkpoint, free - ASIDE)
            raise NotHere(f"{checkpoint.path}: takes {gb(needed)} on {self.device}, {gb(free)} are free",
                          f"{', '.join(fitting)} would fit; or --device cpu" if fitting else "--device cpu")

    def _bytes(self, entry: Entry) -> int:
        if entry.codec.family == "float" or len(entry.shape) == 1:
            return entry.parameters * self.dtype.itemsize
        return prepared_bytes(entry, self.device, self.dtype, self.kernel)

    def plan(self, **sizes: Any) -> Plan:
        return Plan(self.device, self.dtype, **sizes)

    def matrix(self, entry: Entry, rows: slice | np.ndarray | None = None) -> Prepared:
        q = entry.load()
        if rows is not None:
            q = weights.rows_apart(q).part(rows if isinstance(rows, slice) else torch.from_numpy(rows))
        return self._prepared(q)

    def experts(self, entries: list[Entry]) -> list[Prepared]:
        """One stack; experts that lie apart, as their codecs differ, are decoded for it."""
        if len(entries[0].shape) == 3:
            return [self._prepared(entries[0].load())]
        values = torch.stack([entry.load().dequantize(self.dtype) for entry in entries])
        return [floats(values.to(self.device))]

    def _prepared(self, q: QTensor) -> Prepared:
        if q.codec.family == "float":
            with _room():
                return floats(q.dequantize(self.dtype).to(self.device))
        with _room():
            return prepare(q, self.device, self.dtype, self.kernel)

    def cache(self, plan: Plan, capacity: int, kept: str) -> Cache:
        with _room():
            return Cache(plan, capacity)

    def free_bytes(self, promised: Iterable[int]) -> int:
        return devices.free_bytes(self.device)


@contextmanager
def _room() -> Iterator[None]:
    """
    Raises:
        NotHere: memory that was free before has gone.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NotHere(str(error).splitlines()[0], "--device cpu, or a smaller model or context") from None
