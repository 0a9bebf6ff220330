"""Integers: int-k group-wise as GPTQ and AWQ store them, and the rowwise int8 of LLM.int8()."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from fewbits.codecs import base, native, search
from fewbits.codecs.base import Codec, Grid, Params, Planes, Shape
from fewbits.codecs.grids import UniformGrid
from fewbits.codecs.packing import pack_bits, packed_bytes, unpack_bits
from fewbits.codecs.pieces import Piece, fit_pieces
from fewbits.errors import FewbitsError
from fewbits.lazy import torch

DEFAULT_GROUP = {2: 64, 3: 64, 4: 128, 8: 128}
SCALE_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True)
class IntK(Codec):
    """`scale * (code - zero)`: k-bit codes, a scale and perhaps an integer zero point for each group of columns."""

    bits: int
    group: int  # columns; -1: the row
    symmetric: bool = True  # the zero point is the middle code, and not stored
    scale_kind: str = "F16"
    family: ClassVar[str] = "int"
    settled: ClassVar[bool] = True
    linear: ClassVar[tuple[str, ...]] = ("scale",)

    @property
    def integer_bits(self) -> int:  # type: ignore[override]
        return self.bits

    @property
    def name(self) -> str:
        group = "row" if self.group == -1 else f"g{self.group}"
        suffix = "" if self.symmetric else "-asym"
        return f"int{self.bits}-{group}{suffix}" + ("" if self.scale_kind == "F16" else f"-s{self.scale_kind.lower()}")

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, SCALE_DTYPES[self.scale_kind])

    def unit(self, columns: int) -> int:
        return max(1, columns if self.group == -1 else min(self.group, columns))

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Any = None) -> Params:
        found = native.Zero(self.top, search.SHRINKS[self.bits])
        params = fit_pieces(self._fit, w, importance, self.dtype,
                            search=native.even("scale", self.bits) if self.symmetric else found)
        return params if "zero" in params else params | {"zero": self._middles(params["scale"])}

    def _middles(self, scale: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scale, self.middle, dtype=torch.uint8)

    def _fit(self, p: Piece) -> Params:
        if self.symmetric:
            s = search.search_scale(p, -self.middle, self.middle - 1, search.symmetric_starts(p, self.bits),
                                    -self.middle)
            return {"scale": p.stored(s)}
        s, zero = search.search_zero(p, self.top, search.SHRINKS[self.bits])
        return {"scale": p.stored(s), "zero": zero.to(torch.uint8)}

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, importance: torch.Tensor | None) -> Params:
        scale = search.refit_scale(w, codes, params["scale"], params["zero"], importance)
        return {"scale": scale, "zero": params["zero"]}

    def grid(self, params: Params, columns: int) -> Grid:
        zero = float(self.middle) if self.symmetric else params["zero"].float()
        return UniformGrid(params["scale"].float(), self.top, columns, zero=zero)

    def pack(self, codes: torch.Tensor, params: Params, shape: Shape) -> Planes:
        planes = {"codes": pack_bits(codes, self.bits), "scales": params["scale"][..., 0].to(self.dtype)}
        if not self.symmetric:
            planes["zeros"] = pack_bits(params["zero"][..., 0], self.bits)
        return planes

    def unpack(self, planes: Planes, shape: Shape) -> tuple[torch.Tensor, Params]:
        scale = planes["scales"].unsqueeze(-1)
        if self.symmetric:
            zero = self._middles(scale)
        else:
            zero = unpack_bits(planes["zeros"], self.bits, scale.shape[1]).unsqueeze(-1)
        return unpack_bits(planes["codes"], self.bits, shape[-1]), {"scale": scale, "zero": zero}

    def planes(self, shape: Shape) -> dict[str, tuple[str, Shape]]:
        rows, columns = self.matrix(shape)
        units = base.units(columns, self.unit(columns))
        planes: dict[str, tuple[str, Shape]] = {
            "codes": ("uint8", (rows, packed_bytes(columns, self.bits))),
            "scales": (SCALE_DTYPES[self.scale_kind], (rows, units))}
        if not self.symmetric:
            planes["zeros"] = ("uint8", (rows, packed_bytes(units, self.bits)))
        return planes


@dataclass(frozen=True)
class Int8(Codec):
    """LLM.int8(): `code * absmax / 127` with one float32 absmax a row; codes -127 … 127, kept here as code + 128."""

    family: ClassVar[str] = "int8"
    linear: ClassVar[tuple[str, ...]] = ("absmax",)
    STEP: ClassVar[float] = 7.874015718698502e-3  # 1/127 as bitsandbytes multiplies by it

    @property
    def name(self) -> str:
        return "int8"

    def unit(self, columns: int) -> int:
        return max(1, columns)

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Any = None) -> Params:
        starts = (127, *search.ROWWISE_STARTS)
        found = fit_pieces(self._fit, w, importance, torch.float32,
                           search=native.Scale("scale", -127, 127, (starts, starts), positive=True))
        return {"absmax": found["scale"].abs() * 127}

    def _fit(self, p: Piece) -> Params:
        return {"scale": p.stored(search.search_scale(p, -127, 127, search.ROWWISE_STARTS, 127))}

    def grid(self, params: Params, columns: int) -> Grid:
        return UniformGrid(params["absmax"], 255, columns, zero=128.0, low=1, factor=self.STEP)

    def pack(self, codes: torch.Tensor, params: Params, shape: Shape) -> Planes:
        return {"codes": (codes ^ 128).view(torch.int8), "absmax": params["absmax"][:, 0]}

    def unpack(self, planes: Planes, shape: Shape) -> tuple[torch.Tensor, Params]:
        return planes["codes"].view(torch.uint8) ^ 128, {"absmax": planes["absmax"].unsqueeze(1)}

    def planes(self, shape: Shape) -> dict[str, tuple[str, Shape]]:
        rows, columns = self.matrix(shape)
        return {"codes": ("int8", (rows, columns)), "absmax": ("float32", (rows, 1))}


INT8 = Int8()
_NAME = re.compile(r"int([2348])(?:-(?:g(\d+)|(row)))?(-asym)?(?:-s(bf16|f32))?")


def parse(name: str) -> Codec | None:
    if name.lower() == "int8":
        return INT8
    match = _NAME.fullmatch(name.lower())
    if match is None:
        return None
    bits, group, row, asymmetric, scale = match.groups()
    columns = -1 if row else int(group) if group else DEFAULT_GROUP[int(bits)]
    if columns == 0:
        raise FewbitsError(f"codec {name!r}: a group of 0 columns", f"for example: int{bits}-g64, or int{bits}-row")
    return IntK(int(bits), columns, asymmetric is None, (scale or "F16").upper())
