"""IQ4_NL and IQ4_XS of ggml: 16 levels that lie closer together near zero, under fp16 scales.

IQ4_NL: 32 columns share a scale, `d * level`. IQ4_XS: super-blocks of 256, eight sub-blocks of 32 columns with 6-bit
scales: `(d * (scale - 32)) * level`. Nibbles: column i of 32 in the low and column i + 16 in the high half of byte i.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from fewbits.codecs import native
from fewbits.codecs.base import Grid, Params
from fewbits.codecs.ggml import Blocks, join_halves, split_halves
from fewbits.codecs.grids import Levels, TableGrid, levels
from fewbits.codecs.packing import join_fields, pack_bits, split_fields, unpack_bits
from fewbits.codecs.pieces import Piece, fit_pieces
from fewbits.codecs.search import IQ4_STARTS, WEIGHTED_IQ4_STARTS, refit_scale, search_levels
from fewbits.codecs.subscales import fit_level_scales, refit_scales
from fewbits.lazy import torch

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # by code


@cache
def table() -> Levels:
    return levels(torch.tensor(LEVELS, dtype=torch.float32))


def starts(p: Piece) -> tuple[float, ...]:
    return IQ4_STARTS if p.weight is None else WEIGHTED_IQ4_STARTS


@cache
def natively() -> native.Scale:
    first, last = LEVELS[0], LEVELS[-1]
    return native.Scale("d", first, last, ((first, *IQ4_STARTS), (first, *WEIGHTED_IQ4_STARTS)), table())


@dataclass(frozen=True)
class IQ4_NL(Blocks):
    columns: ClassVar[int] = 32
    settled: ClassVar[bool] = True
    linear: ClassVar[tuple[str, ...]] = ("d",)
    integer_bits: ClassVar[int] = 4
    block_bytes: ClassVar[int] = 18

    @property
    def name(self) -> str:
        return "IQ4_NL"

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Any = None) -> Params:
        return fit_pieces(lambda p: {"d": p.stored(search_levels(p, table(), starts(p)))}, w, importance, torch.float16,
                          search=self.description)

    @property
    def description(self) -> native.Search:
        return natively()

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, importance: torch.Tensor | None) -> Params:
        q = table().table.to(codes.device)[codes.int()]
        return {"d": refit_scale(w, q, params["d"], 0.0, importance)}

    def grid(self, params: Params, columns: int) -> Grid:
        return TableGrid(params["d"].float(), table(), columns)

    def join(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        return join_fields(params["d"], join_halves(codes, 16))

    def split(self, blocks: torch.Tensor) -> tuple[torch.Tensor, Params]:
        d, nibbles = split_fields(blocks, (2, torch.float16), (16, torch.uint8))
        return split_halves(nibbles, 16), {"d": d}


@dataclass(frozen=True)
class IQ4_XS(Blocks):
    """A block: d, the high two bits of the scales, their low four bits, nibbles. Params hold scales less 32."""

    columns: ClassVar[int] = 256
    settled: ClassVar[bool] = True
    linear: ClassVar[tuple[str, ...]] = ("d",)
    integer_bits: ClassVar[int] = 4
    block_bytes: ClassVar[int] = 136
    subs: ClassVar[int] = 8
    integers: ClassVar[dict[str, tuple[int, int]]] = {"scales": (-32, 31)}

    @property
    def name(self) -> str:
        return "IQ4_XS"

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Any = None) -> Params:
        return fit_pieces(lambda p: fit_level_scales(p, table(), starts(p)), w, importance, torch.float16, self.subs,
                          search=self.description)

    @property
    def description(self) -> native.Search:
        return native.SubScales(natively(), self.subs, 6)

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, importance: torch.Tensor | None) -> Params:
        q = table().table.to(codes.device)[codes.int()]
        return fit_pieces(refit_scales, w, importance, torch.float16, self.subs,
                          [q, params["d"], params["scales"]])

    def grid(self, params: Params, columns: int) -> Grid:
        return TableGrid(params["d"].float() * params["scales"], table(), columns)

    def join(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        scales = (params["scales"] + 32).view(torch.uint8)
        return join_fields(params["d"], pack_bits(scales >> 4, 2), pack_bits(scales & 15, 4), join_halves(codes, 16))

    def split(self, blocks: torch.Tensor) -> tuple[torch.Tensor, Params]:
        d, high, low, nibbles = split_fields(blocks, (2, torch.float16), (2, torch.uint8), (4, torch.uint8),
                                             (128, torch.uint8))
        scales = unpack_bits(low, 4, 8) | (unpack_bits(high, 2, 8) << 4)
        return split_halves(nibbles, 16), {"d": d, "scales": scales.view(torch.int8) - 32}


TYPES = {c.name: c for c in (IQ4_NL(), IQ4_XS())}


def parse(name: str) -> IQ4_NL | IQ4_XS | None:
    return TYPES.get(name.upper())
