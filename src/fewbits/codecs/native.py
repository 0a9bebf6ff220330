"""The searches for scales in the native extension, some thirty times as fast as those in Python.

The same algorithms with fewer starts, of which the best few go on; where they start is said here. Codecs hand a
description of their search to `fit_pieces`, which takes the reference where tensors are on another device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from fewbits import _native
from fewbits.instructions import threads
from fewbits.lazy import torch

if TYPE_CHECKING:
    from fewbits.codecs.grids import Levels

STORAGE = {"torch.float32": 0, "torch.float16": 1, "torch.bfloat16": 2}


def ratios(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(first * (last / first) ** (i / (count - 1)) for i in range(count))


# as in `search`, chosen on weights of SmolLM2 and Gemma 3: by bits, parts of the plain scale
SPREADS = {2: ratios(0.6, 1.6, 6), 3: ratios(0.8, 1.3, 4), 4: ratios(0.7, 1.4, 12), 5: ratios(0.7, 1.2, 16),
           6: ratios(0.7, 1.03, 16), 8: ratios(0.94, 1.01, 24)}
WEIGHTED_SPREADS = {2: ratios(0.6, 2.2, 8), 3: ratios(0.6, 2.2, 8), 4: ratios(0.6, 2.1, 12), 5: ratios(0.65, 1.7, 16),
                    6: ratios(0.7, 1.1, 16), 8: ratios(0.88, 1.15, 32)}
# as in `lines`: by the number of levels, parts of the range, and shifts of the middle in steps
STRETCHES = {16: ratios(0.65, 1.15, 6), 32: ratios(0.65, 1.15, 10)}
SUB_STRETCHES = {4: (0.66, 0.79, 0.92, 1.06, 1.16), 16: (0.64, 0.76, 0.89, 1.02, 1.11),
                 32: (0.71, 0.87, 0.96, 1.03, 1.1)}
WEIGHTED_SUB_STRETCHES = {4: ratios(0.5, 1.1, 5), 16: ratios(0.6, 1.15, 7), 32: ratios(0.7, 1.15, 7)}
SHIFTS = (0.0, 0.33, -0.33)
WEIGHTED_SHIFTS = (0.0, 0.25, -0.25, 0.5, -0.5)
NEAR_SCALES = tuple((n, 0) for n in (0, -1, 1))
NEAR_LINES = tuple(sorted(product((0, -1, 1), (0, -1, 1)), key=lambda n: n[0] ** 2 + n[1] ** 2))
NO_LEVELS: tuple[float, ...] = ()


class _Call(NamedTuple):
    """The first arguments of every search: weights and importances `[rows, units, columns]`, how scales are stored;
    where blocks go, if they are wanted."""

    w: torch.Tensor
    importance: torch.Tensor | None
    storage: int
    threads: int
    packer: _native.Packer | None = None
    blocks: torch.Tensor | None = None

    def out(self, each: int = 1, dtype: str = "float32") -> torch.Tensor:
        return torch.empty(self.w.shape[0] * self.w.shape[1], each, dtype=getattr(torch, dtype))


@dataclass(frozen=True)
class Search:
    """How a codec's parameters are found."""

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, dtype: torch.dtype) -> dict[str, Any] | None:
        """Parameters `[..., k]` of the units `w` `[..., unit]`, scales in `dtype`; None where the extension cannot."""
        if w.shape[-1] == 0 or not _takes(w, importance):
            return None
        lead = w.shape[:-1]
        found, _ = self._run(_Call(_cube(w), _known(w, importance), STORAGE[str(dtype)], threads()))
        return {k: (p.to(dtype) if p.is_floating_point() else p).reshape(*lead, p.shape[-1]) for k, p in found.items()}

    def pack(self, w: torch.Tensor, importance: torch.Tensor | None, packer: _native.Packer,
             block_bytes: int) -> tuple[torch.Tensor, tuple[float, float]] | None:
        """Blocks `[rows, units * block_bytes]` of `w` `[rows, units, unit]` with float16 scales; the (weighted) squares
        of what is lost, and those of `w`. None where the extension cannot."""
        if not _takes(w, importance):
            return None
        blocks = torch.empty(w.shape[0], w.shape[1], block_bytes, dtype=torch.uint8)
        known = _known(w, importance)
        _, squares = self._run(_Call(w.detach(), known, STORAGE["torch.float16"], threads(), packer,
                                     blocks.view(-1, block_bytes)))
        return blocks.flatten(1), squares

    def _run(self, call: _Call) -> tuple[dict[str, torch.Tensor], tuple[float, float]]:
        raise NotImplementedError


@dataclass(frozen=True)
class Scale(Search):
    """Values `scale * level`: integers `low` … `high`, or a table. `starts` are levels on which the element of largest
    magnitude is put, without importances and with them; the first is the plain choice."""

    name: str
    low: float
    high: float
    starts: tuple[tuple[float, ...], tuple[float, ...]]
    table: Levels | None = None
    positive: bool = False

    def _run(self, call: _Call) -> tuple[dict[str, torch.Tensor], tuple[float, float]]:
        found = call.out()
        squares = _native.fit_scale(*call, *_levels(self.low, self.high, self.table), self.parts(call), 4, 3,
                                    self.positive, found)
        return {self.name: found}, squares

    def parts(self, call: _Call) -> torch.Tensor:
        """The scales of the starts, in parts of the largest element."""
        return _inverse(self.starts[call.importance is not None])


@dataclass(frozen=True)
class Zero(Search):
    """Values `scale * (code - zero)`, codes 0 … `top`; `shrinks` are parts of the range that is covered."""

    top: int
    shrinks: tuple[float, ...]

    def _run(self, call: _Call) -> tuple[dict[str, torch.Tensor], tuple[float, float]]:
        scale, zero = call.out(), call.out(dtype="uint8")
        squares = _native.fit_zero(*call[:4], self.top, _floats(self.shrinks), 4, 3, scale, zero)
        return {"scale": scale, "zero": zero}, squares


@dataclass(frozen=True)
class Line(Search):
    """Values `d * code + m` with so many codes."""

    levels: int

    def _run(self, call: _Call) -> tuple[dict[str, torch.Tensor], tuple[float, float]]:
        d, m = call.out(), call.out()
        starts = _lines(self.levels, STRETCHES[self.levels], WEIGHTED_SHIFTS)
        squares = _native.fit_line(*call, self.levels - 1, *starts, 8, 3, d, m)
        return {"d": d, "m": m}, squares


@dataclass(frozen=True)
class SubScales(Search):
    """Values `(d * scale) * level`, `subs` integer scales of `scale_bits` bits; else like `Scale`."""

    scale: Scale
    subs: int
    scale_bits: int

    def _run(self, call: _Call) -> tuple[dict[str, torch.Tensor], tuple[float, float]]:
        most = 1 << (self.scale_bits - 1)
        d, scales = call.out(), call.out(self.subs, "int8")
        one = self.scale
        rough = call.importance is None and one.high < 4  # more steps gain 0.2 % of the error of Q3_K
        steps, near, descents = (10, NEAR_SCALES[:1], 1) if rough else (17, NEAR_SCALES, 2)
        squares = _native.fit_scales(*call, *_levels(one.low, one.high, one.table), one.parts(call), 4, 2, self.subs,
                                     -most, most - 1, _steps(most)[:steps], _near(near), descents, d, scales)
        return {"d": d, "scales": scales}, squares


@dataclass(frozen=True)
class SubLines(Search):
    """Values `(d * scale) * code - dmin * minimum`, `subs` scales and minimums of `scale_bits` bits."""

    levels: int
    subs: int
    scale_bits: int

    def _run(self, call: _Call) -> tuple[dict[str, torch.Tensor], tuple[float, float]]:
        most, weighted = (1 << self.scale_bits) - 1, call.importance is not None
        starts = (_lines(self.levels, WEIGHTED_SUB_STRETCHES[self.levels], WEIGHTED_SHIFTS) if weighted else
                  _lines(self.levels, SUB_STRETCHES[self.levels], SHIFTS))
        kept, rounds, minima, descents = (8, 3, 4, 3) if weighted or self.levels > 16 else (4, 3, 3, 2)
        d, dmin, scales, mins = call.out(), call.out(), call.out(self.subs, "uint8"), call.out(self.subs, "uint8")
        squares = _native.fit_lines(*call, self.levels - 1, *starts, kept, rounds, self.subs, most, _steps(most),
                                    minima, _near(NEAR_LINES), descents, d, dmin, scales, mins)
        return {"d": d, "dmin": dmin, "scales": scales, "mins": mins}, squares


@cache
def even(name: str, bits: int, plain: int = 0) -> Scale:
    """For codes -2^(bits-1) … 2^(bits-1) - 1. `plain` is the level that a quantizer without search puts the largest
    magnitude on; the lowest where it is 0. The scale's sign matters only where that lies beyond the highest level."""
    middle = 1 << (bits - 1)

    def starts(spreads: tuple[float, ...]) -> tuple[float, ...]:
        return (plain or -middle, *(sign * part * middle for part in spreads for sign in (-1, 1)
                                    if sign < 0 or part * middle > middle - 0.5))

    return Scale(name, -middle, middle - 1, (starts(SPREADS[bits]), starts(WEIGHTED_SPREADS[bits])))


# blocks ---------------------------------------------------------------------------------------------------------------
def packer(join: Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor], columns: int, bits: int,
           like: dict[str, torch.Tensor], integers: dict[str, tuple[int, int]], table: Levels | None) -> _native.Packer:
    """How `join` lays out blocks, found by setting one bit after the other of what it is given: codes of `bits` bits,
    then parameters `like` these, float16 or integers of a range."""
    given = [("codes", columns, bits, 0, torch.uint8)]
    for k, p in like.items():
        low, high = integers.get(k, (0, 0xFFFF))
        given.append((k, p.shape[-1], (high - low).bit_length(), low, p.dtype))
    count = 1 + sum(n * each for _, n, each, _, _ in given)  # no bit, then one each
    values, places, at, byte = {}, [], 1, 0
    for k, n, each, low, dtype in given:
        x = torch.zeros(count, n, dtype=torch.int32)
        for i, bit in product(range(n), range(each)):
            x[at, i] = 1 << bit
            places.append((byte + (2 * i if each == 16 else i) + bit // 8, bit % 8))
            at += 1
        values[k] = x.to(torch.int16).view(torch.float16) if each == 16 else (x + low).to(dtype)
        byte += n * (2 if each == 16 else 1)
    blocks = join(values.pop("codes"), values)
    constant = blocks[0].contiguous()
    moved: dict[tuple[int, int, int], int] = {}  # from, to, shift: bits
    for (source, bit), flips in zip(places, (blocks[1:] ^ constant).numpy(), strict=True):
        (target,) = flips.nonzero()[0]
        to_bit = int(flips[target]).bit_length() - 1
        assert flips[target] == 1 << to_bit
        key = (source, int(target), to_bit - bit)
        moved[key] = moved.get(key, 0) | 1 << to_bit
    terms: list[list[int]] = []  # from, to, run, shift, mask
    for (source, target, shift), mask in sorted(moved.items(), key=lambda m: (m[0][2], m[1], m[0][1] - m[0][0], m[0])):
        last = terms[-1] if terms else [-1] * 5
        if last[3:] == [shift, mask] and (source, target) == (last[0] + last[2], last[1] + last[2]):
            last[2] += 1
        else:
            terms.append([source, target, 1, shift, mask])
    return _native.Packer(torch.tensor(terms, dtype=torch.int32), constant, byte, _codes_of(table)[1])


# codes and values of a known grid, and bytes --------------------------------------------------------------------------
class Shared(NamedTuple):
    """What columns share: `[..., s]`, each for `columns / s` in a row. Values are (code - zero) * scale * factor +
    offset, or with a table table[code] * scale."""

    scale: torch.Tensor
    offset: torch.Tensor | None = None
    zero: torch.Tensor | float = 0.0
    factor: float = 1.0
    table: Levels | None = None

    def takes(self, x: torch.Tensor) -> bool:
        """Whether the extension can."""
        lead = x.shape[:-1]
        return (here(x) and here(self.scale) and x.numel() > 0 and
                x.shape[-1] % self.scale.shape[-1] == 0 and
                torch.broadcast_shapes(lead, self.scale.shape[:-1]) == lead)

    def spread(self, lead: torch.Size) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, float, float]:
        shape = (*lead, self.scale.shape[-1])
        scale = _flat(self.scale.expand(shape))
        offset = None if self.offset is None else _flat(self.offset.expand(shape))
        if isinstance(self.zero, torch.Tensor):
            return scale, offset, _flat(self.zero.expand(shape)), 0.0, self.factor
        return scale, offset, None, self.zero, self.factor


def codes(w: torch.Tensor, shared: Shared, low: int, high: int) -> torch.Tensor | None:
    """Nearest codes of `w` `[..., columns]`; None where the extension cannot say."""
    if not shared.takes(w):
        return None
    found = torch.empty(w.shape, dtype=torch.uint8)
    bounds, order = _codes_of(shared.table)
    _native.codes(_flat(w), threads(), *shared.spread(w.shape[:-1]), low, high, bounds, order,
                  found.view(-1, w.shape[-1]))
    return found


def values(codes: torch.Tensor, shared: Shared) -> torch.Tensor | None:
    """Values (float32) of `codes` `[..., columns]`; None where the extension cannot say."""
    if codes.dtype != torch.uint8 or not shared.takes(codes):
        return None
    found = torch.empty(codes.shape)
    table = _floats(NO_LEVELS)
    if shared.table is not None:
        table = torch.nn.functional.pad(shared.table.table, (0, 256 - len(shared.table.table)))
    _native.values(codes.reshape(-1, codes.shape[-1]).contiguous(), threads(), *shared.spread(codes.shape[:-1]), table,
                   found.view(-1, codes.shape[-1]))
    return found


def planes(codes: torch.Tensor, bits: int, parts: int, run: int) -> torch.Tensor | None:
    """`bits` of each code: in every `parts * run` columns byte j holds those of columns j, j + run, j + 2 run …, lowest
    first; None where the extension cannot."""
    if not here(codes) or codes.dtype != torch.uint8 or not codes.numel():
        return None
    packed = torch.empty(*codes.shape[:-1], codes.shape[-1] // parts, dtype=torch.uint8)
    _native.planes(codes.reshape(-1), threads(), bits, parts, run, packed.view(-1))
    return packed


def unplanes(packed: torch.Tensor, bits: int, parts: int, run: int) -> torch.Tensor | None:
    """The inverse of `planes`."""
    if not here(packed) or packed.dtype != torch.uint8 or not packed.numel():
        return None
    codes = torch.empty(*packed.shape[:-1], packed.shape[-1] * parts, dtype=torch.uint8)
    _native.unplanes(packed.reshape(-1), threads(), bits, parts, run, codes.view(-1))
    return codes


def nonfinite(x: torch.Tensor) -> int:
    """How many values of `x`, of a float type that files hold, are NaN or infinite."""
    if not here(x):
        return x.numel() - int(x.isfinite().sum())
    return _native.nonfinite(x.detach().reshape(-1).contiguous(), threads())


# arguments ------------------------------------------------------------------------------------------------------------
def here(x: torch.Tensor) -> bool:
    """Whether `x` lies where the extension can compute with it."""
    return x.device.type == "cpu"


def _takes(w: torch.Tensor, importance: torch.Tensor | None) -> bool:
    return here(w) and (importance is None or here(importance))


def _known(w: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor | None:
    return None if importance is None else _cube(importance.float().expand(w.shape))


def _cube(x: torch.Tensor) -> torch.Tensor:
    """`[..., columns]` of a type that files hold as `[rows, units, columns]`."""
    x = x.detach() if str(x.dtype) in STORAGE else x.detach().float()
    return x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1]) if x.ndim < 3 else x.flatten(0, -3)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.detach().float().reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


@cache
def _floats(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@cache
def _inverse(levels: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor([1 / level for level in levels], dtype=torch.float32)


@cache
def _lines(levels: int, stretches: tuple[float, ...], shifts: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales in parts of the range, and how far below its middle the offset lies."""
    top = levels - 1
    starts = [(part / top, part / top * (top / 2 + shift)) for part, shift in product(stretches, shifts)]
    scales, drops = zip(*starts, strict=True)
    return _floats(scales), _floats(drops)


@cache
def _steps(most: int) -> torch.Tensor:
    """Levels near `most`, and halves between them, on which the largest scale is put."""
    return _floats((most, most + 1, most + 0.5, *(most - i / 2 for i in range(1, 15))))


@cache
def _near(pairs: tuple[tuple[int, int], ...]) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.float32)


def _levels(low: float, high: float,
            table: Levels | None) -> tuple[float, float, torch.Tensor, torch.Tensor]:
    if table is None:
        return low, high, _floats(NO_LEVELS), _floats(NO_LEVELS)
    ranked = table.table.sort().values
    return float(ranked[0]), float(ranked[-1]), table.bounds, ranked.diff()


def _codes_of(table: Levels | None) -> tuple[torch.Tensor, torch.Tensor]:
    if table is None:
        return _floats(NO_LEVELS), torch.empty(0, dtype=torch.uint8)
    return table.bounds, table.order.to(torch.uint8)

