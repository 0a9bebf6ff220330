"""Arrays of strings in a GGUF file, found fast and decoded when asked for: vocabularies have 10^5 of them.

Each string is its length, 8 bytes little-endian, and its bytes. In text without NUL, seven zeros in a row are the upper
bytes of a length below 256; where every length found that way leads to the next one, the walk is proven.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

WINDOW = 1 << 16  # bytes looked at together
SLOW = 1 << 12  # strings walked one by one before the fast way is tried again
FEW = 1 << 6  # strings that are not worth a look at a window


class NotText(ValueError):
    """A string that is not UTF-8: its place in the array, and the byte of it that is wrong."""

    def __init__(self, index: int, byte: int):
        super().__init__(f"string {index} is not UTF-8 at its byte {byte}")
        self.index, self.byte = index, byte


class Strings(Sequence[str]):
    """A list of strings over the mapped file."""

    def __init__(self, buffer: mmap.mmap, starts: np.ndarray):
        self.buffer = buffer
        self.starts = starts  # of the texts, and where one more would start

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return str(self.buffer[int(self.starts[i]):int(self.starts[i + 1]) - 8].decode())

    def __iter__(self) -> Iterator[str]:
        for at in range(0, len(self), SLOW):
            first, last = int(self.starts[at]), int(self.starts[min(at + SLOW, len(self))]) - 8
            raw, starts = self.buffer[first:last], (self.starts[at:at + SLOW + 1] - first).tolist()
            for start, after in zip(starts[:-1], starts[1:], strict=True):
                yield raw[start:after - 8].decode()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (list, Strings)) and len(self) == len(other) and all(
            a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return repr(self[:4])[:-1] + (", …]" if len(self) > 4 else "]")

    @property
    def end(self) -> int:
        """Where the last string ends."""
        return int(self.starts[-1]) - 8

    def check(self) -> None:
        """Decode everything once, without keeping it.

        Raises:
            NotText: one of them is not UTF-8.
        """
        lengths = np.diff(self.starts) - 8
        for at in range(0, len(self), SLOW):
            first, last = int(self.starts[at]), int(self.starts[min(at + SLOW, len(self))]) - 8
            raw = self.buffer[first:last]
            wide = np.flatnonzero(lengths[at + 1:at + SLOW] >= 128)  # other lengths are ASCII, and end any sequence
            if len(wide):
                text = bytearray(raw)
                for i in wide:
                    start = int(self.starts[at + 1 + i]) - first
                    text[start - 8:start] = bytes(8)
                raw = bytes(text)
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                wrong = first + error.start
                index = int(np.searchsorted(self.starts, wrong, "right")) - 1
                raise NotText(index, wrong - int(self.starts[index])) from None


def walk(buffer: mmap.mmap, at: int, count: int) -> Strings:
    """The `count` strings from byte `at` on.

    Raises:
        IndexError: the file ends before them; its argument is the number of the string that is not there.
    """
    parts: list[np.ndarray] = []
    found = 0
    while found < count:
        part, at = _guess(buffer, at, count - found)
        if not len(part):
            part, at = _step(buffer, at, min(SLOW, count - found))
        found += len(part)
        if at > len(buffer) or not len(part):
            raise IndexError(max(found - 1, 0) if at > len(buffer) else found)
        parts.append(part)
    return Strings(buffer, np.concatenate([*parts, np.array([at], np.int64)]) + 8)


def _guess(buffer: mmap.mmap, at: int, count: int) -> tuple[np.ndarray, int]:
    """Where lengths stand from `at` on, as far as it is certain, and what follows the last string."""
    window = np.frombuffer(buffer, np.uint8, max(0, min(WINDOW, len(buffer) - at)), at)
    zero = window == 0
    pairs = zero[:-1] & zero[1:]
    fours = pairs[:-2] & pairs[2:]
    places = np.flatnonzero(fours[1:-3] & fours[4:])[:count].astype(np.int64)  # seven zeros from the next byte on
    if not len(places) or places[0]:
        return places[:0], at
    after = places + 8 + window[places]
    wrong = np.flatnonzero(after[:-1] != places[1:])
    sure = int(wrong[0]) + 1 if len(wrong) else len(places)
    if sure < min(FEW, count):
        return places[:0], at
    return places[:sure] + at, at + int(after[sure - 1])


def _step(buffer: mmap.mmap, at: int, count: int) -> tuple[np.ndarray, int]:
    """The same for exactly `count` strings, one by one; fewer where the file ends."""
    places: list[int] = []
    length: Any = struct.Struct("<Q").unpack_from
    while len(places) < count and at + 8 <= len(buffer):
        places.append(at)
        at += 8 + length(buffer, at)[0]
    return np.array(places, np.int64), at
