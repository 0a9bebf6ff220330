"""Simple block types of ggml: 32 columns share one float16 scale, and in the `_1` types a float16 minimum.

A block is its scale, its minimum if it has one, the fifth bits of 5-bit codes (bit i of a little-endian uint32 is
column i's), then the codes: 8-bit ones as signed bytes; of the others the low four bits, column i in the low and column
i + 16 in the high nibble of byte i.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from fewbits import _native
from fewbits.codecs import native, search
from fewbits.codecs.base import Codec, Grid, Params, Planes, Searched, Shape
from fewbits.codecs.grids import UniformGrid
from fewbits.codecs.lines import fit_line
from fewbits.codecs.packing import join_fields, pack_bits, split_fields, unpack_bits
from fewbits.codecs.pieces import Piece, fit_pieces
from fewbits.lazy import torch


class Blocks(Codec):
    """A ggml type: `{"blocks": uint8 [rows, bytes]}` holds exactly the file's bytes."""

    family: ClassVar[str] = "ggml"
    columns: ClassVar[int]  # of a block

    @property
    def block_bytes(self) -> int:
        raise NotImplementedError

    def unit(self, columns: int) -> int:
        return self.columns

    def check(self, shape: Shape) -> str | None:
        if shape[-1] % self.columns:
            return f"{shape[-1]} columns are not a multiple of {self.columns}, the block of {self.name}"
        return None

    def planes(self, shape: Shape) -> dict[str, tuple[str, Shape]]:
        rows, columns = self.matrix(shape)
        return {"blocks": ("uint8", (rows, columns // self.columns * self.block_bytes))}

    @property
    def description(self) -> native.Search | None:
        """Of the search in `fit`, for the native extension; None where it has none."""
        return None

    def search(self, w: torch.Tensor, importance: torch.Tensor | None) -> Searched | None:
        if self.description is None or not w.numel():
            return None
        units = w.unflatten(-1, (-1, self.columns))
        known = None if importance is None else importance.unflatten(-1, (-1, self.columns))
        found = self.description.pack(units, known, _packer(self), self.block_bytes)
        if found is None:
            return None
        blocks, (off, whole) = found
        return Searched({"blocks": blocks}, off / max(whole, 1e-30))

    def pack(self, codes: torch.Tensor, params: Params, shape: Shape) -> Planes:
        return {"blocks": self.join(codes.unflatten(-1, (-1, self.columns)), params).flatten(-2)}

    def unpack(self, planes: Planes, shape: Shape) -> tuple[torch.Tensor, Params]:
        codes, params = self.split(planes["blocks"].unflatten(-1, (-1, self.block_bytes)))
        return codes.flatten(-2), params

    def join(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        """Codes `[..., columns]` and params `[..., k]` to blocks `[..., bytes]`."""
        raise NotImplementedError

    def split(self, blocks: torch.Tensor) -> tuple[torch.Tensor, Params]:
        """The inverse of `join`."""
        raise NotImplementedError


@cache
def _packer(codec: Blocks) -> _native.Packer:
    like = codec.fit(torch.zeros(1, codec.columns), None)
    table = getattr(codec.grid(like, codec.columns), "table", None)
    return native.packer(codec.join, codec.columns, codec.integer_bits, like, codec.integers, table)


def join_halves(codes: torch.Tensor, run: int) -> torch.Tensor:
    """4-bit codes to bytes: of every 2 * run columns the first run in the low nibbles, the rest in the high ones."""
    found = native.planes(codes, 4, 2, run)
    if found is not None:
        return found
    pairs = codes.unflatten(-1, (-1, 2, run))
    return (pairs[..., 0, :] | (pairs[..., 1, :] << 4)).flatten(-2)


def split_halves(data: torch.Tensor, run: int) -> torch.Tensor:
    """The inverse of `join_halves`."""
    found = native.unplanes(data, 4, 2, run)
    if found is not None:
        return found
    runs = data.unflatten(-1, (-1, run))
    return torch.stack([runs & 15, runs >> 4], -2).flatten(-3)


@dataclass(frozen=True)
class Simple(Blocks):
    """`d * (code - zero)`, or `d * code + m`."""

    label: str
    bits: int
    minimum: bool
    columns: ClassVar[int] = 32
    settled: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return self.label

    @property
    def integer_bits(self) -> int:  # type: ignore[override]
        return self.bits

    @property
    def block_bytes(self) -> int:
        return 2 + 2 * self.minimum + 4 * self.bits

    @property
    def linear(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("d", "m") if self.minimum else ("d",)

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def plain(self) -> int:
        """The level that quantizers without search put the largest magnitude on."""
        return 127 if self.bits == 8 else -self.zero

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Any = None) -> Params:
        return fit_pieces(self._fit, w, importance, torch.float16, search=self.description)

    @property
    def description(self) -> native.Search:
        return native.Line(1 << self.bits) if self.minimum else native.even("d", self.bits, self.plain)

    def _fit(self, p: Piece) -> Params:
        if self.minimum:
            return fit_line(p, (1 << self.bits) - 1)
        s = search.search_scale(p, -self.zero, self.zero - 1, search.symmetric_starts(p, self.bits), self.plain)
        return {"d": p.stored(s)}

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, importance: torch.Tensor | None) -> Params:
        if self.minimum:
            return search.refit_line(w, codes, params["d"], params["m"], importance)
        return {"d": search.refit_scale(w, codes, params["d"], float(self.zero), importance)}

    def grid(self, params: Params, columns: int) -> Grid:
        top = (1 << self.bits) - 1
        if self.minimum:
            return UniformGrid(params["d"].float(), top, columns, offset=params["m"].float())
        return UniformGrid(params["d"].float(), top, columns, zero=float(self.zero))

    def join(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        fields = [params["d"]] + ([params["m"]] if self.minimum else [])
        if self.bits == 8:
            return join_fields(*fields, codes ^ 128)
        if self.bits == 5:
            fields.append(pack_bits(codes >> 4, 1))
        return join_fields(*fields, join_halves(codes & 15, 16))

    def split(self, blocks: torch.Tensor) -> tuple[torch.Tensor, Params]:
        scales = 1 + self.minimum
        sizes = [(2, torch.float16)] * scales
        if self.bits == 8:
            *values, codes = split_fields(blocks, *sizes, (32, torch.uint8))
            codes = codes ^ 128
        elif self.bits == 5:
            *values, fifth, low = split_fields(blocks, *sizes, (4, torch.uint8), (16, torch.uint8))
            codes = split_halves(low, 16) | (unpack_bits(fifth, 1, 32) << 4)
        else:
            *values, low = split_fields(blocks, *sizes, (16, torch.uint8))
            codes = split_halves(low, 16)
        return codes, dict(zip(("d", "m"), values, strict=False))


TYPES = {c.name: c for c in (
    Simple("Q4_0", 4, False), Simple("Q4_1", 4, True), Simple("Q5_0", 5, False), Simple("Q5_1", 5, True),
    Simple("Q8_0", 8, False))}


def parse(name: str) -> Codec | None:
    return TYPES.get(name.upper())
