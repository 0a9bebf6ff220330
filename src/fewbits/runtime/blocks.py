"""Where the blocks of ggml's types hold what the planes of the native layout hold: as data, for one native pass.

What the fields are is said where the codecs are; here is only where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock
from weakref import ref

import numpy as np

from fewbits import _native
from fewbits.codecs.base import ITEM_BYTES, Codec, units
from fewbits.codecs.ggml import Blocks
from fewbits.instructions import threads
from fewbits.runtime.interleaved import BLOCK, TILE, form
from fewbits.stored import Apart

LINE = 64  # bytes: planes begin on lines of their own
PAGE, ARENA = 2 << 20, 32 << 20  # bytes of a large page, and of what is allocated at a time


@dataclass(frozen=True)
class Bits:
    """Some bits of `count` values of a block, from number `first` on; of all values unless said otherwise.

    Those of value i, counted from there, lie in byte `at + i // (run * each) * run + i % run`, from bit
    `shift + i // run % each * bits` up, and are the value's bits from `to` up. `digits`: in base 3, see TQ1_0.
    """

    at: int
    bits: int
    run: int
    each: int = 1  # values in a byte
    to: int = 0
    first: int = 0
    count: int = 0
    shift: int = 0
    digits: bool = False
    swapped: bool = False  # halves of bytes: the first value in the upper one

    def numbers(self, values: int) -> tuple[int, int, int, int, int, int, int, int, bool, bool]:
        """As the native extension takes them, for a block of so many values."""
        return (self.first, self.count or values, self.at, self.bits, self.run, self.each, self.shift, self.to,
                self.digits, self.swapped)


@dataclass(frozen=True)
class Fields:
    """Of a block: `minus` is what codes and sub-scales are stored with and have no more in the native layout."""

    codes: tuple[Bits, ...]
    scale: int  # the byte where it begins
    minimum: int | None = None
    subscales: tuple[Bits, ...] = ()
    submins: tuple[Bits, ...] = ()
    kind: str = "float16"  # of scale and minimum
    codes_minus: int = 0
    subscales_minus: int = 0


def _halves(at: int, run: int) -> Bits:
    return Bits(at, 4, run, 2)


def _plane(at: int, bits: int, to: int = 0) -> Bits:
    return Bits(at, bits, 32, 8 // bits, to)


def _stream(at: int, bits: int, to: int = 0) -> Bits:
    return Bits(at, bits, 1, 8 // bits, to)


def _sixes(at: int, high: int) -> tuple[Bits, ...]:
    """Eight numbers of 6 bits: four in as many bytes, whose upper two bits are those of the other four."""
    return (Bits(at, 6, 4, count=4), Bits(12, 4, 4, first=4, count=4, shift=high),
            Bits(at, 2, 4, first=4, count=4, shift=6, to=4))


SCALES, MINIMUMS = _sixes(4, 0), _sixes(8, 4)
FIELDS: dict[str, Fields] = {
    "Q4_0": Fields((_halves(2, 16),), scale=0),
    "Q4_1": Fields((_halves(4, 16),), scale=0, minimum=2),
    "Q5_0": Fields((_halves(6, 16), _stream(2, 1, to=4)), scale=0),
    "Q5_1": Fields((_halves(8, 16), _stream(4, 1, to=4)), scale=0, minimum=2),
    "Q8_0": Fields((Bits(2, 8, 32),), scale=0, codes_minus=128),
    "Q2_K": Fields((_plane(16, 2),), scale=80, minimum=82, subscales=(Bits(0, 8, 16),)),
    "Q3_K": Fields((_plane(32, 2), _plane(0, 1, to=2)), scale=108,
                   subscales=(_halves(96, 8), Bits(104, 2, 4, 4, to=4)), subscales_minus=32),
    "Q4_K": Fields((_halves(16, 32),), scale=0, minimum=2, subscales=SCALES, submins=MINIMUMS),
    "Q5_K": Fields((_halves(48, 32), _plane(16, 1, to=4)), scale=0, minimum=2, subscales=SCALES, submins=MINIMUMS),
    "Q6_K": Fields((_halves(0, 64), _plane(128, 2, to=4)), scale=208, subscales=(Bits(192, 8, 16),)),
    "IQ4_NL": Fields((_halves(2, 16),), scale=0),
    "IQ4_XS": Fields((_halves(8, 16),), scale=0, subscales=(_stream(4, 4), _stream(2, 2, to=4)), subscales_minus=32),
    "MXFP4": Fields((_halves(1, 16),), scale=0, kind="uint8"),
    "TQ1_0": Fields((Bits(0, 2, 32, 5, count=160, digits=True), Bits(32, 2, 16, 5, first=160, count=80, digits=True),
                     Bits(48, 2, 4, 4, first=240, count=16, digits=True)), scale=52),
    "TQ2_0": Fields((_plane(0, 2),), scale=64),
    "Q1_0": Fields((_stream(2, 1),), scale=0),
}


@cache
def natively(codec: Codec) -> _native.Blocks | None:
    """How a codec's blocks lie, for the native extension; None of what is no ggml type with a native form."""
    fields, f = FIELDS.get(codec.name), form(codec)
    if fields is None or f is None or not isinstance(codec, Blocks):
        return None
    subs = codec.columns // f.sub
    return _native.Blocks(
        bytes=codec.block_bytes, columns=codec.columns, bits=f.bits, scale_bytes=ITEM_BYTES[fields.kind],
        scale_at=fields.scale, min_at=-1 if fields.minimum is None else fields.minimum,
        codes=[b.numbers(codec.columns) for b in fields.codes], codes_minus=fields.codes_minus,
        subscales=[b.numbers(subs) for b in fields.subscales], subscales_minus=fields.subscales_minus,
        submins=[b.numbers(subs) for b in fields.submins])


def sizes(codec: Codec, rows: int, columns: int) -> dict[str, int]:
    """Bytes of the planes of a matrix of one of ggml's types."""
    fields, f = FIELDS[codec.name], form(codec)
    assert f is not None
    entries = units(rows, TILE) * TILE * units(columns, codec.unit(columns))
    subs = units(rows, TILE) * TILE * units(columns, f.sub)
    found = {"codes": units(rows, TILE) * units(columns, BLOCK) * 64 * f.bits,
             "scales": entries * ITEM_BYTES[fields.kind]}
    if fields.minimum is not None:
        found["mins"] = found["scales"]
    return found | {name: subs for name in ("subscales", "submins") if getattr(fields, name)}


def planes(codec: Codec, data: Sequence[np.ndarray], rows: int, columns: int,
           index: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Planes of the native layout, uint8, of a matrix whose rows lie in `data` (bytes), one array after the other;
    `index` says which of them each row is, where they do not lie in order."""
    blocks = natively(codec)
    assert blocks is not None
    found = empty(sizes(codec, rows, columns))
    _native.prepare(blocks, data, index, rows, columns, found["codes"], found["scales"], found.get("mins"),
                    found.get("subscales"), found.get("submins"), threads())
    return found


def planes_apart(found: Apart) -> dict[str, np.ndarray] | None:
    """The same of a matrix whose codes and scales lie apart; None where its rows have no whole blocks."""
    (rows, columns), f = found.shape, form(found.codec)
    if columns % BLOCK or f is None:
        return None
    bits = f.bits
    if found.across:  # a block of 32 columns is `bits` words of every row
        per, run = 32 // bits, 1 if bits < 8 else 4
        fields = [Bits(4 * rows * w, bits, run, 8 // bits, first=per * w, count=per) for w in range(bits)]
    elif bits == 8:
        fields = [Bits(0, 8, 32)]
    else:
        fields = [Bits(0, 4, 1, 2, swapped=True)]
    blocks = _native.Blocks(
        bytes=4 * bits * (rows if found.across else 1), columns=BLOCK, bits=bits, scale_bytes=0, scale_at=0, min_at=-1,
        codes=[b.numbers(BLOCK) for b in fields], codes_minus=0 if found.across or bits < 8 else 128, subscales=[],
        subscales_minus=0, submins=[])
    codes = empty({"codes": units(rows, TILE) * columns // BLOCK * 64 * bits})["codes"]
    _native.prepare(blocks, [found.codes], None, rows, columns, codes, None, None, None, None, threads(),
                    stride=4 if found.across else None)
    made = {"codes": codes, "scales": _tiles(found.scales)}
    return made if found.zeros is None else made | {"mins": _tiles(found.zeros)}


def _tiles(values: np.ndarray) -> np.ndarray:
    """Bytes of `[rows, groups]`, 16 rows side by side."""
    rows, groups = values.shape
    whole = np.zeros((units(rows, TILE) * TILE, groups), values.dtype)
    whole[:rows] = values
    return np.ascontiguousarray(whole.reshape(-1, TILE, groups).swapaxes(1, 2)).reshape(-1).view(np.uint8)


def empty(sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Arrays of so many bytes each, side by side."""
    whole, at, found = _arena.take(lined(sizes)), 0, {}
    for name, size in sizes.items():
        found[name] = whole[at:at + size]
        at += lined({name: size})
    return found


def lined(sizes: dict[str, int]) -> int:
    """What they take together, each in lines of its own."""
    return sum(units(size, LINE) * LINE for size in sizes.values())


class _Arena:
    """Memory in large pages for one matrix after the other, which alone would fill few of them. Freed with its last."""

    def __init__(self) -> None:
        self._lock, self._at = Lock(), 0
        self._whole: Callable[[], np.ndarray | None] = lambda: None

    def take(self, size: int) -> np.ndarray:
        with self._lock:
            whole = self._whole()
            if whole is None or self._at + size > len(whole):
                whole = _native.expected()
                if whole is None or size + PAGE > len(whole):
                    whole = np.empty(max(size, ARENA) + PAGE, np.uint8)
                    _native.advise(whole)
                self._whole, self._at = ref(whole), -whole.ctypes.data % PAGE
            found = whole[self._at:self._at + size]
            self._at += size
        return found


_arena = _Arena()
