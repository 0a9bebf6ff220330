"""How each codec's codes and parameters become planes of the native layout, and back: a `Form` a family, as data.

The layout is drawn in docs/concepts/kernels.md, its names are those of csrc/weight.h:
`factor * scale * (code - zero) + offset`, or `factor * scale * level[code]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fewbits import _native
from fewbits.codecs.base import Codec, Params, Shape, units
from fewbits.lazy import torch

if TYPE_CHECKING:
    from fewbits.codecs.affine import IntK
    from fewbits.codecs.ggml import Simple
    from fewbits.codecs.ggml_old import Old
    from fewbits.codecs.kquants import Q2_K, Symmetric, WithMinimum
    from fewbits.codecs.table import Table

TILE, BLOCK = 16, 32  # rows of a tile, columns of a block
SCALES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "uint8": "e8m0"}  # by torch's name
MIDDLE = 128  # what is added to signed bytes
FINEST, COARSEST, STEPS = 127, 96, 16  # levels are rounded to bytes of -127 … 127; factors tried between integers


@dataclass(frozen=True)
class Form:
    """Numbers for the kernel, and which parameter `[rows, units, k]` each plane holds.

    `join` makes what a plane holds of parameters, where it isn't one; `split` undoes it. `kept` are parameters that no
    plane holds exactly: they stay beside them.
    """

    bits: int
    zero: int = 0
    sub: int = BLOCK  # columns of a sub-block
    factor: float = 1.0
    scaling: str = "plain"
    values: tuple[float, ...] = ()  # by code, over `factor`
    levels: tuple[int, ...] = ()  # the same as bytes, plus `zero`
    planes: dict[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    join: Callable[[Params], Params] | None = None
    split: Callable[[Params], Params] | None = None

    def to_planes(self, params: Params) -> dict[str, torch.Tensor]:
        """Plane -> `[rows, entries]`."""
        params = params if self.join is None else params | self.join(params)
        return {plane: params[name].flatten(1) for plane, name in self.planes.items()}

    def to_params(self, planes: dict[str, torch.Tensor], units: int) -> Params:
        """The inverse of `to_planes`, without what is `kept`; `units` of a row."""
        params = {name: planes[plane].unflatten(1, (units, -1)) for plane, name in self.planes.items()}
        return params if self.split is None else self.split(params)


def rounded(values: tuple[float, ...]) -> tuple[tuple[int, ...], float]:
    """Levels as signed bytes, and the factor that makes values of them: 1 for integers, else the one that rounds with
    the least squared error. NF4's are off by at most 0.0039 of the largest, FP4's by 0.0031."""
    levels = np.array(values, np.float64)
    factors = np.abs(levels).max() * STEPS / np.arange(COARSEST * STEPS, FINEST * STEPS + 1, dtype=np.float64)
    if np.array_equal(levels, levels.round()):
        factors = np.ones(1)
    whole = (levels / factors[:, None]).round()
    best = np.square(whole * factors[:, None] - levels).sum(1).argmin()
    return tuple(map(int, whole[best])), float(factors[best])


def scale_name(dtype: torch.dtype) -> str:
    """What the native extension calls scales, or weights, of this type."""
    return SCALES[str(dtype).removeprefix("torch.")]


def weight(f: Form, rows: int, columns: int, unit: int, scale: str, planes: Mapping[str, Any],
           order: np.ndarray | None = None, fine: bool = False) -> _native.Weight:
    """A matrix of these planes, `unit` columns of which share a scale, for the native kernels.

    `order` (int32) says which column of the activations meets each column of it. `fine`: what rounding takes from the
    activations is rounded as well. Both are for decoders; `multiply` and `grouped` know nothing of them.
    """
    blocks = units(columns, BLOCK)
    return _native.Weight(
        rows=rows, columns=columns, bits=f.bits, zero=f.zero, sub=f.sub, factor=f.factor,
        group=blocks if unit >= columns else unit // BLOCK, scaling=f.scaling, scale=scale, values=f.values,
        levels=f.levels, order=order, fine=fine,
        **{name: planes.get(name) for name in ("codes", "scales", "mins", "subscales", "submins")})


def form(codec: Codec) -> Form | None:
    """The native form of a codec, or None where it has none."""
    found = next((FORMS[kind.__name__] for kind in type(codec).__mro__ if kind.__name__ in FORMS), None)
    return None if found is None else found(codec)


def unfit(codec: Codec, shape: Shape) -> str | None:
    """Why a weight of this codec and shape has no native form, or None."""
    if form(codec) is None:
        return f"no native form of {codec.name}"
    if len(shape) not in (2, 3) or 0 in shape[1:]:
        return f"{list(shape)} is no matrix, nor a stack of matrices"
    columns, unit = shape[-1], codec.unit(shape[-1])
    if codec.matrix(shape) != (math.prod(shape[:-1]), columns) or codec.check(shape):
        return f"blocks of {codec.name} cross rows of {columns} columns"
    if unit < columns and unit % BLOCK:
        return f"groups of {unit} columns are not multiples of {BLOCK}"
    return None


def _simple(codec: Simple | Old) -> Form:
    if codec.minimum:
        return Form(codec.bits, scaling="minimum", planes={"scales": "d", "mins": "m"})
    return Form(codec.bits, zero=1 << (codec.bits - 1), planes={"scales": "d"})


def _lines(codec: WithMinimum) -> Form:
    return Form(codec.bits, scaling="lines",
                planes={"scales": "d", "mins": "dmin", "subscales": "scales", "submins": "mins"})


def _nibbles(codec: Q2_K) -> Form:
    def join(params: Params) -> Params:
        return {"both": params["scales"] | (params["mins"] << 4)}

    def split(params: Params) -> Params:
        both = params.pop("both")
        return params | {"scales": both & 15, "mins": both >> 4}

    return Form(2, sub=16, scaling="nibbles", planes={"scales": "d", "mins": "dmin", "subscales": "both"},
                join=join, split=split)


def _small(codec: Symmetric) -> Form:
    return Form(codec.bits, zero=codec.middle, sub=16, scaling="small", planes={"scales": "d", "subscales": "scales"})


def _levels(values: tuple[float, ...], planes: dict[str, str], scaling: str = "plain", bits: int = 4,
            kept: tuple[str, ...] = (), join: Callable[[Params], Params] | None = None) -> Form:
    whole, factor = rounded(values)
    return Form(bits, MIDDLE, factor=factor, scaling=scaling, values=tuple(v / factor for v in values),
                levels=tuple(v + MIDDLE for v in whole), planes=planes, kept=kept, join=join)


def _table(codec: Table) -> Form:
    from fewbits.codecs.table import TABLES

    def join(params: Params) -> Params:
        return {"absmax": codec._absmax(params)}

    kept = ("absmax_code", "nested_absmax", "offset") if codec.nested else ()
    return _levels(TABLES[codec.kind], {"scales": "absmax"}, kept=kept, join=join)


def _iq4(planes: dict[str, str], scaling: str) -> Form:
    from fewbits.codecs.iq4 import LEVELS

    return _levels(tuple(map(float, LEVELS)), planes, scaling)


def _mxfp4(codec: Codec) -> Form:
    from fewbits.codecs.mxfp4 import E2M1

    return _levels(tuple(map(float, E2M1)), {"scales": "exponent"})


def _int(codec: IntK) -> Form:
    if codec.symmetric:
        return Form(codec.bits, zero=codec.middle, planes={"scales": "scale"})
    return Form(codec.bits, scaling="zeros", planes={"scales": "scale", "mins": "zero"})


# by a codec's class or what it is derived from: names, as modules are imported when their codecs are used
FORMS: dict[str, Callable[..., Form]] = {
    "Simple": _simple, "Old": _simple, "WithMinimum": _lines, "Q2_K": _nibbles, "Symmetric": _small, "IntK": _int,
    "Table": _table, "MXFP4": _mxfp4,
    "IQ4_NL": lambda codec: _iq4({"scales": "d"}, "plain"),
    "IQ4_XS": lambda codec: _iq4({"scales": "d", "subscales": "scales"}, "small"),
    "Q1_0": lambda codec: _levels((-1.0, 1.0), {"scales": "d"}, bits=1),
    **{name: lambda codec: Form(2, zero=1, planes={"scales": "d"}) for name in ("TQ1_0", "TQ2_0")},
    "Int8": lambda codec: Form(8, MIDDLE, factor=codec.STEP, planes={"scales": "absmax"}),
}
