"""What a number format is: parameters fitted to units of columns, a grid of values, and packed planes.

Every scalar format is `value = scale * level[code] + offset`. A *unit* is a run of columns of one row whose parameters
are chosen together: the group of int-k, a block of Q4_0, the super-block of a K-quant. Parameters are a dict of tensors
`[..., k]`, k values a unit, already rounded to what files hold; over a whole tensor they are `[rows, units, k]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from fewbits.lazy import torch

Shape = tuple[int, ...]
Params = dict[str, "torch.Tensor"]
Planes = dict[str, "torch.Tensor"]
Rounder = Callable[["torch.Tensor"], "torch.Tensor"]
ITEM_BYTES = {"uint8": 1, "int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}


class Rounding(NamedTuple):
    """How the columns of a unit with params `[rows, k]` are rounded; tensors `[s, rows]`, each row of them for
    `columns / s` columns side by side. `inverse` is that of the scale, 0 of the zero scale.

    Evenly spaced levels: code = clamp(round(shift + w * inverse), low, high), value = base + code * scale. Else the
    value is scale times that level of the ascending `table` whose bounds w * inverse lies between.
    """

    scale: torch.Tensor
    inverse: torch.Tensor
    shift: torch.Tensor | None = None
    base: torch.Tensor | None = None
    low: float = 0.0
    high: float = 0.0
    table: torch.Tensor | None = None  # [levels]
    bounds: torch.Tensor | None = None  # [levels - 1]


class Searched(NamedTuple):
    """Planes, and by how much decoded values differ: the (weighted) sum of squares over that of the weights."""

    planes: Planes
    loss: float


class Grid(Protocol):
    """The values that codes stand for, once the parameters are known. Column-wise: `[..., columns]`."""

    def encode(self, w: torch.Tensor) -> torch.Tensor:
        """Nearest codes (uint8) of `w` `[..., columns]`."""

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Values (float32) of `codes` `[..., columns]`, bit for bit as the format's reference computes them."""

    def columns(self, index: torch.Tensor | slice) -> Grid:
        """The same grid restricted to some columns of its unit."""

    def rounding(self) -> Rounding | None:
        """How its columns are rounded, as numbers; None where `rounders` says it only as code."""
        return None

    def rounders(self, width: int) -> list[Rounder]:
        """For each of all `width` columns, what gives the nearest values of weights `[rows]` in it, to float32
        rounding; for a unit with params `[rows, k]`. Solvers that go column by column make these once a unit."""
        def rounder(one: Grid) -> Rounder:
            return lambda w: one.decode(one.encode(w.unsqueeze(1)))[:, 0]
        return [rounder(self.columns(slice(i, i + 1))) for i in range(width)]


@dataclass(frozen=True)
class Codec:
    """A number format; a frozen value. Subclasses say how; solvers and containers see only this interface."""

    integer_bits: ClassVar[int] = 8  # bits of one code
    linear: ClassVar[tuple[str, ...]] = ()  # float parameters, one a unit, in which values are linear
    integers: ClassVar[dict[str, tuple[int, int]]] = {}  # the same for integers of sub-blocks: lowest, highest
    settled: ClassVar[bool] = False  # `fit` ends with least squares, so that `refit` gains less than a thousandth
    family: ClassVar[str] = ""  # which containers take it: "float", "ggml", "int", "table", "int8"

    @property
    def name(self) -> str:
        raise NotImplementedError

    # shapes ---------------------------------------------------------------------------------------------------------
    def unit(self, columns: int) -> int:
        """Columns whose parameters are chosen together, in a row of `columns`."""
        raise NotImplementedError

    def check(self, shape: Shape) -> str | None:
        """Why a tensor of this shape cannot take the codec, or None."""
        return None

    def matrix(self, shape: Shape) -> tuple[int, int]:
        """Rows and columns in which units lie side by side; differs from the shape where blocks cross rows."""
        return (math.prod(shape[:-1]), shape[-1])

    def rows_apart(self, shape: Shape) -> bool:
        """Whether every row packs by itself, so that rows can be permuted, split and stacked without decoding."""
        return True

    def stacks(self, shape: Shape) -> bool:
        """Whether planes at `[count, *rest]` are those of `count` tensors of shape `rest`, one after the other."""
        return self.rows_apart(shape)

    def nbytes(self, shape: Shape) -> int:
        """Bytes of all planes."""
        return sum(math.prod(size) * ITEM_BYTES[dtype] for dtype, size in self.planes(shape).values())

    def bits_per_weight(self, shape: Shape) -> float:
        return self.nbytes(shape) * 8 / max(1, math.prod(shape))

    # values ---------------------------------------------------------------------------------------------------------
    def begin(self, w: torch.Tensor, importance: torch.Tensor | None) -> Params | None:
        """What units must know of the whole tensor `w` `[rows, columns]` before they are fitted, `[rows, units, k]`."""
        return None

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Params | None = None) -> Params:
        """Parameters of the units `w` `[..., unit]`, minimising the (importance-weighted) squared error.

        `importance` broadcasts to `w`; `state` is what `begin` said of these units, `[..., k]`; a ragged last unit
        comes alone, in a call of its own.
        """
        raise NotImplementedError

    def search(self, w: torch.Tensor, importance: torch.Tensor | None) -> Searched | None:
        """What `fit`, the nearest codes and `pack` make of `w` `[rows, columns]` of any float dtype, in one go; None
        where there is no such way."""
        return None

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params,
              importance: torch.Tensor | None) -> Params:
        """Better parameters for fixed codes; the default keeps them."""
        return params

    def basis(self, codes: torch.Tensor, params: Params) -> Params:
        """By how much values change with the entries of each float parameter: `[..., k, columns]` for given codes
        `[..., columns]`. Empty where no parameter can be chosen freely."""
        still = params | {k: torch.zeros_like(params[k]) for k in self.linear}
        return {k: self.grid(still | {k: torch.ones_like(params[k])}, codes.shape[-1]).decode(codes).unsqueeze(-2)
                for k in self.linear}

    def grid(self, params: Params, columns: int) -> Grid:
        """The grid of units `columns` wide with parameters `[..., k]`."""
        raise NotImplementedError

    # activations ----------------------------------------------------------------------------------------------------
    @property
    def blind(self) -> Codec:
        """The codec for layers of whose inputs nothing is known; another one where planes hold something of these."""
        return self

    def calibrated(self, planes: Planes, peaks: torch.Tensor) -> Planes:
        """The planes with what they hold of inputs, whose largest magnitude is `peaks` `[1]`, or `[experts]`."""
        return planes

    # bytes ----------------------------------------------------------------------------------------------------------
    def pack(self, codes: torch.Tensor, params: Params, shape: Shape) -> Planes:
        """Codes `[rows, columns]` and params `[rows, units, k]` to canonical planes, each `[rows, bytes or values]`."""
        raise NotImplementedError

    def unpack(self, planes: Planes, shape: Shape) -> tuple[torch.Tensor, Params]:
        """The inverse of `pack`."""
        raise NotImplementedError

    def planes(self, shape: Shape) -> dict[str, tuple[str, Shape]]:
        """Name -> (torch dtype name, shape) of every plane."""
        raise NotImplementedError


def spans(columns: int, unit: int) -> Iterator[tuple[slice, slice, int]]:
    """The column range, unit range and width of the full units of a row, then of the ragged last one."""
    full = columns // unit
    if full:
        yield slice(0, full * unit), slice(0, full), unit
    if columns % unit:
        yield slice(full * unit, columns), slice(full, full + 1), columns % unit


def units(columns: int, unit: int) -> int:
    return -(-columns // unit)


def fit_units(w: torch.Tensor, codec: Codec, importance: torch.Tensor | None, state: Params | None) -> Params:
    """Fit every unit of `w` `[rows, columns]` at once; params `[rows, units, k]`."""
    parts = []
    for cols, us, width in spans(w.shape[1], codec.unit(w.shape[1])):
        weight = None if importance is None else importance[..., cols].reshape(*importance.shape[:-1], -1, width)
        part = None if state is None else {k: s[:, us] for k, s in state.items()}
        parts.append(codec.fit(w[:, cols].reshape(w.shape[0], -1, width), weight, part))
    return {k: torch.cat([p[k] for p in parts], dim=1) for k in parts[0]}


def refit_units(w: torch.Tensor, codes: torch.Tensor, codec: Codec, params: Params,
                importance: torch.Tensor | None) -> Params:
    """`refit` every unit of `w` `[rows, columns]` at once."""
    parts = []
    for cols, us, width in spans(w.shape[1], codec.unit(w.shape[1])):
        weight = None if importance is None else importance[..., cols].reshape(*importance.shape[:-1], -1, width)
        shape = (w.shape[0], -1, width)
        parts.append(codec.refit(w[:, cols].reshape(shape), codes[:, cols].reshape(shape),
                                 {k: p[:, us] for k, p in params.items()}, weight))
    return {k: torch.cat([p[k] for p in parts], dim=1) for k in parts[0]}


def encode_units(w: torch.Tensor, codec: Codec, params: Params) -> torch.Tensor:
    """Nearest codes of `w` `[rows, columns]`."""
    return _by_units(w, codec, params, lambda grid, part: grid.encode(part))


def decode_units(codes: torch.Tensor, codec: Codec, params: Params) -> torch.Tensor:
    """Values of `codes` `[rows, columns]`."""
    return _by_units(codes, codec, params, lambda grid, part: grid.decode(part))


def _by_units(x: torch.Tensor, codec: Codec, params: Params,
              apply: Callable[[Grid, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    parts = []
    for cols, us, width in spans(x.shape[1], codec.unit(x.shape[1])):
        grid = codec.grid({k: p[:, us] for k, p in params.items()}, width)
        parts.append(apply(grid, x[:, cols].reshape(x.shape[0], -1, width)).reshape(x.shape[0], -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
