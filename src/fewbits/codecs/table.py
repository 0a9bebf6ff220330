"""4-bit tables of bitsandbytes: NF4 and FP4, blocks over the flattened tensor, absmax nested or not."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from fewbits.codecs import base, native, search
from fewbits.codecs.base import Codec, Grid, Params, Planes, Shape
from fewbits.codecs.grids import Levels, TableGrid, levels
from fewbits.codecs.pieces import Piece, fit_pieces
from fewbits.errors import FewbitsError
from fewbits.lazy import torch

TABLES = {  # by code
    # QLoRA (arXiv 2305.14314): quantiles of the normal distribution, zero exact
    "nf4": (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    # sign, then 0, 1/16, 8, 12, 4, 6, 2, 3, all over 12
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}
NESTED_BLOCK = 256  # absmax values that share a nested absmax


@cache
def table(kind: str) -> Levels:
    return levels(torch.tensor(TABLES[kind], dtype=torch.float32))


@cache
def natively(kind: str, signed: bool) -> native.Scale:
    def starts(parts: tuple[float, ...]) -> tuple[float, ...]:
        return (1.0, *(sign / part for part in parts for sign in ((1, -1) if signed else (1,))))

    both = starts(search.TABLE_FACTORS), starts(search.WEIGHTED_TABLE_FACTORS)
    return native.Scale("absmax", min(TABLES[kind]), max(TABLES[kind]), both, table(kind), positive=True)


@cache
def dynamic_map() -> Levels:
    """bitsandbytes' signed 8-bit map for nested absmax: seven decades, the upper ones cut more finely.

    Decade i (10^(i-7) … 10^(i-6)) has the midpoints of 2^i equal cuts of 0.1 … 1, each sign; 0 and 1 complete the 256.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** i + 1, dtype=torch.float32)
        middles = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + [-m for m in middles]
    return levels(torch.tensor(sorted(values), dtype=torch.float32))


@dataclass(frozen=True)
class Table(Codec):
    """`table[code] * absmax`, one absmax a block; blocks run on over the ends of rows where they don't divide them."""

    kind: str
    block: int = 64
    nested: bool = False
    family: ClassVar[str] = "table"
    integer_bits: ClassVar[int] = 4

    @property
    def name(self) -> str:
        return self.kind + (f"-b{self.block}" if self.block != 64 else "") + ("-dq" if self.nested else "")

    @property
    def linear(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.nested else ("absmax",)

    def unit(self, columns: int) -> int:
        return max(1, min(self.block, columns))

    def matrix(self, shape: Shape) -> tuple[int, int]:
        return (1, math.prod(shape)) if shape[-1] % self.block else (math.prod(shape[:-1]), shape[-1])

    def rows_apart(self, shape: Shape) -> bool:
        return not self.nested and shape[-1] % self.block == 0

    def stacks(self, shape: Shape) -> bool:
        return not self.nested and math.prod(shape[1:]) % self.block == 0

    def begin(self, w: torch.Tensor, importance: torch.Tensor | None) -> Params | None:
        """Where absmax is nested: the tensor's mean absmax, and the largest distance from it in every 256 blocks."""
        if not self.nested:
            return None
        peaks = []
        for cols, _, width in base.spans(w.shape[1], self.unit(w.shape[1])):
            low, high = w[:, cols].unflatten(1, (-1, width)).aminmax(dim=-1)
            peaks.append(torch.maximum(high, -low).float())
        absmax = torch.cat(peaks, 1)
        offset = absmax.mean()
        most = torch.stack([(part - offset).abs().amax() for part in absmax.reshape(-1).split(NESTED_BLOCK)])
        nested = most.repeat_interleave(NESTED_BLOCK)[:absmax.numel()].view(*absmax.shape, 1)
        return {"nested_absmax": nested, "offset": offset.expand(nested.shape)}

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Params | None = None) -> Params:
        if self.nested and state is None:
            raise ValueError(f"{self.name}: nested absmax needs the state that begin() returns")
        signed = self.kind == "nf4" and not self.nested
        wanted = fit_pieces(lambda p: {"absmax": p.stored(search.search_table(p, table(self.kind), signed))}, w,
                            importance, torch.float32, search=natively(self.kind, signed))
        if state is None:
            return wanted
        return fit_pieces(self._fit_nested, w, importance, torch.float32,
                          more=(wanted["absmax"], state["nested_absmax"], state["offset"]))

    def _fit_nested(self, p: Piece) -> Params:
        levels_ = table(self.kind)
        nested = dict(zip(("nested_absmax", "offset"), p.more[1:], strict=True))
        codes = self._absmax_codes(p.more[0], nested)
        near = [(codes.int() + i).clamp(0, 255).to(torch.uint8) for i in (-1, 0, 1)]
        errors = [search.table_error(p, self._absmax({"absmax_code": c, **nested}) / p.step, levels_) for c in near]
        best = torch.stack(errors).argmin(0, keepdim=True)
        return {"absmax_code": torch.stack(near).gather(0, best)[0], **nested}

    @staticmethod
    def _absmax_codes(absmax: torch.Tensor, state: Params) -> torch.Tensor:
        spread = torch.where(state["nested_absmax"] == 0, torch.inf, state["nested_absmax"])
        bounds = dynamic_map().bounds.to(absmax.device)
        return torch.bucketize((absmax - state["offset"]) / spread, bounds).to(torch.uint8)

    def _absmax(self, params: Params) -> torch.Tensor:
        if "absmax" in params:
            return params["absmax"]
        codes = params["absmax_code"]
        values = dynamic_map().table.to(codes.device).index_select(0, codes.reshape(-1).int()).reshape(codes.shape)
        return values * params["nested_absmax"] + params["offset"]

    def grid(self, params: Params, columns: int) -> Grid:
        return TableGrid(self._absmax(params), table(self.kind), columns)

    def pack(self, codes: torch.Tensor, params: Params, shape: Shape) -> Planes:
        if not self.rows_apart(shape):
            codes = codes.reshape(-1)
        if codes.shape[-1] % 2:
            codes = torch.cat([codes, codes.new_full((1,), TABLES[self.kind].index(0.0))])
        planes = {"codes": (codes[..., ::2] << 4) | codes[..., 1::2]}
        if not self.nested:
            absmax = params["absmax"][..., 0]
            return planes | {"absmax": absmax if self.rows_apart(shape) else absmax.reshape(-1)}
        return planes | {"absmax": params["absmax_code"].reshape(-1),
                         "nested_absmax": params["nested_absmax"].reshape(-1)[::NESTED_BLOCK].contiguous(),
                         "offset": params["offset"].reshape(-1)[:1].contiguous()}

    def unpack(self, planes: Planes, shape: Shape) -> tuple[torch.Tensor, Params]:
        rows, columns = self.matrix(shape)
        codes = torch.stack([planes["codes"] >> 4, planes["codes"] & 15], -1).flatten(-2)
        if not self.rows_apart(shape):
            codes = codes[:rows * columns]
        codes = codes.reshape(rows, columns)
        if not self.nested:
            return codes, {"absmax": planes["absmax"].reshape(rows, -1, 1)}
        code = planes["absmax"].reshape(rows, -1, 1)
        nested = planes["nested_absmax"].repeat_interleave(NESTED_BLOCK)[:code.numel()].reshape(code.shape)
        return codes, {"absmax_code": code, "nested_absmax": nested,
                       "offset": planes["offset"].reshape(1, 1, 1).expand(code.shape)}

    def planes(self, shape: Shape) -> dict[str, tuple[str, Shape]]:
        rows, columns = self.matrix(shape)
        blocks = base.units(columns, self.unit(columns))
        if self.rows_apart(shape):
            return {"codes": ("uint8", (rows, columns // 2)), "absmax": ("float32", (rows, blocks))}
        blocks *= rows
        planes: dict[str, tuple[str, Shape]] = {"codes": ("uint8", (base.units(rows * columns, 2),))}
        if not self.nested:
            return planes | {"absmax": ("float32", (blocks,))}
        return planes | {"absmax": ("uint8", (blocks,)), "offset": ("float32", (1,)),
                         "nested_absmax": ("float32", (base.units(blocks, NESTED_BLOCK),))}


_NAME = re.compile(r"(nf4|fp4)(?:-b(\d+))?(-dq)?")


def parse(name: str) -> Codec | None:
    match = _NAME.fullmatch(name.lower())
    if match is None:
        return None
    kind, block, nested = match.groups()
    columns = int(block or 64)
    if columns < 2 or columns % 2:
        raise FewbitsError(f"codec {name!r}: blocks of {columns} weights", f"an even number, for example {kind}-b64")
    return Table(kind, columns, nested is not None)
