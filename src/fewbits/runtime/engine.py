"""What computes a decoder's plan: native code on the CPU, or Triton's kernels on a GPU. All else is the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from fewbits import _native
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.errors import FewbitsError, NotHere
from fewbits.lazy import torch
from fewbits.memory import available_bytes
from fewbits.runtime import weights

T = TypeVar("T")
Array = np.ndarray
Rows = slice | Array | None  # of a matrix: all of them, or those that make up a part of it
Plan = Any  # records steps and runs them, as `_native.Plan` does
Weight = Any  # what a plan's products take

CACHES = ("f16", "q8_0", "q4_0")  # what keys and values are rounded to: 16, 8.5 and 4.5 bits each


class Cache(Protocol):
    """Keys and values of a sequence."""

    stretched: bool

    @property
    def length(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    def copy(self, source: Any, length: int) -> None: ...
    def truncate(self, length: int) -> None: ...


class Engine(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def caches(self) -> tuple[str, ...]:
        """What keys and values can be rounded to."""

    @property
    def most(self) -> int:
        """Tokens of a call."""

    def check(self, checkpoint: Checkpoint) -> None:
        """
        Raises:
            NotHere: there is no room for its weights.
        """

    def plan(self, *, widths: Sequence[int], layers: int, heads: int, kv_heads: int, head: int,
             scale: float) -> Plan: ...

    def matrix(self, entry: Entry, rows: Rows = None) -> Weight: ...

    def experts(self, entries: list[Entry]) -> list[Weight]:
        """Of a layer: a stack, or one after the other."""

    def cache(self, plan: Plan, capacity: int, kept: str) -> Cache: ...

    def free_bytes(self, promised: Iterable[int]) -> int:
        """Memory for caches; `promised` is what sequences that are there may still take."""


@dataclass(frozen=True)
class Native:
    """The CPU: caches take memory as tokens come."""

    name = "native decoder"
    caches = CACHES

    @property
    def most(self) -> int:
        return _native.MOST_TOKENS

    def check(self, checkpoint: Checkpoint) -> None:
        pass  # what does not fit is paged in from its file

    def plan(self, **sizes: Any) -> Plan:
        return _native.Plan(**sizes)

    def matrix(self, entry: Entry, rows: Rows = None) -> Weight:
        return weights.matrix(entry, rows)

    def experts(self, entries: list[Entry]) -> list[Weight]:
        if len(entries[0].shape) == 3:
            return weights.matrices(entries[0])
        return [weights.matrix(entry, expert=True) for entry in entries]

    def cache(self, plan: Plan, capacity: int, kept: str) -> Cache:
        return _native.Cache(plan, capacity, kept)

    def free_bytes(self, promised: Iterable[int]) -> int:
        return available_bytes() - sum(promised)


def of(device: torch.device | None = None, dtype: torch.dtype | None = None) -> Engine:
    """What computes on a device, by default on the CPU.

    Raises:
        NotHere: Triton does not run on it.
        FewbitsError: a type that is not computed in there.
    """
    if device is None or device.type == "cpu":
        if dtype is not None and dtype != torch.float32:
            raise FewbitsError(f"the CPU's decoder computes in float32, not in {dtype}")
        return Native()
    from fewbits.runtime.triton.available import unavailable

    reason = unavailable(device)
    if reason is not None:
        raise NotHere(f"no decoder on {device}: {reason}", "--device cpu")
    from fewbits.runtime.triton.engine import Gpu

    return Gpu(device, dtype or (torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16))


GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, Windows' own in its Linux


def device(name: str | None) -> torch.device | None:
    """The GPU called `name`; None is the CPU, as is "auto" where there is no GPU, for which torch is not imported.

    Raises:
        FewbitsError: there is no such device.
    """
    if name in (None, "cpu") or name == "auto" and not any(Path(file).exists() for file in GPUS):
        return None
    from fewbits import devices

    found = devices.find(name)
    return None if found.type == "cpu" else found


def placed(name: str | None, make: Callable[[torch.device | None], T]) -> T:
    """What is made on the device called `name`; for "auto" on the CPU where a GPU cannot do it, as stderr says."""
    where = device(name)
    try:
        return make(where)
    except NotHere as reason:
        if name != "auto":
            raise
        print(f"note: {reason}; the CPU computes", file=sys.stderr)
        return make(None)
