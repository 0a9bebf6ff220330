"""Where the bytes of a tensor lie, for those that read them without torch."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fewbits.codecs.base import Codec
from fewbits.codecs.floats import Float


@dataclass(frozen=True)
class Stored:
    """Rows of `columns` values each, packed one by one in `data`, one array after the other.

    Of a vector every value is a row. `index` says which of the rows in `data` each row of the tensor is, if they do not
    lie in order. `plus` is added to the values of floats.
    """

    codec: Codec
    columns: int
    data: tuple[np.ndarray, ...]  # uint8, views of a mapped file
    index: np.ndarray | None = None  # int64
    plus: float = 0.0

    @property
    def row_bytes(self) -> int:
        return self.codec.nbytes((1, self.columns))

    @property
    def rows(self) -> int:
        return sum(part.nbytes for part in self.data) // self.row_bytes if self.index is None else len(self.index)

    def pick(self, index: np.ndarray) -> Stored:
        """Rows `index` of it."""
        return replace(self, index=index if self.index is None else self.index[index])

    def part(self, begin: int, end: int) -> Stored:
        """Rows `begin` … `end` - 1 of it."""
        if self.index is None and len(self.data) == 1:
            return replace(self, data=(self.data[0][begin * self.row_bytes:end * self.row_bytes],))
        return self.pick(np.arange(begin, end))

    def forget(self) -> None:
        """Let the pages of mapped files out of this process's memory; they come back when someone reads them."""
        for part in self.data:
            held: Any = part
            while not isinstance(held, mmap.mmap | None):
                held = held.obj if isinstance(held, memoryview) else getattr(held, "base", None)
            if held is None or not hasattr(held, "madvise"):
                continue
            begin = part.ctypes.data - np.frombuffer(held, np.uint8).ctypes.data
            first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, (begin + part.nbytes) // mmap.PAGESIZE
            if first < last * mmap.PAGESIZE:
                held.madvise(mmap.MADV_DONTNEED, first, last * mmap.PAGESIZE - first)

    def bytes(self) -> np.ndarray:
        """`[rows, row_bytes]`, without a copy where all lies in order."""
        parts = [part.reshape(-1, self.row_bytes) for part in self.data]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole if self.index is None else whole[self.index]

    def values(self) -> np.ndarray:
        """Of floats: float32 `[rows, columns]`."""
        assert isinstance(self.codec, Float), self.codec
        raw = self.bytes()
        if self.codec.kind == "BF16":
            found = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            found = raw.view("<f2" if self.codec.kind == "F16" else "<f4").astype(np.float32)
        return found + np.float32(self.plus) if self.plus else found


@dataclass(frozen=True)
class Apart:
    """A matrix whose codes and scales lie apart, as in GPTQ's and bitsandbytes' files.

    `codes` are those of one row after the other; or, `across`, words of all rows side by side: `[words, rows]`.
    """

    codec: Codec
    shape: tuple[int, int]
    codes: np.ndarray  # uint8
    scales: np.ndarray  # [rows, groups]; bfloat16 as uint16
    zeros: np.ndarray | None = None  # uint8 [rows, groups]
    across: bool = False


def join(parts: list[Stored]) -> Stored | None:
    """The rows of several tensors, one after the other; None where they differ in more than where they lie."""
    first = parts[0]
    if any((p.codec, p.columns, p.plus) != (first.codec, first.columns, first.plus) for p in parts):
        return None
    data = tuple(array for p in parts for array in p.data)
    if all(p.index is None for p in parts):
        return replace(first, data=data)
    index, before = [], 0
    for p in parts:
        index.append(before + (np.arange(p.rows) if p.index is None else p.index))
        before += sum(array.nbytes for array in p.data) // p.row_bytes
    return replace(first, data=data, index=np.concatenate(index))
