"""K-quants of ggml: super-blocks of 256 columns whose sub-blocks have small integer scales under float16 ones.

Byte layouts are in docs/concepts/formats.md. Q4_K and Q5_K: `(d * scale) * code - dmin * minimum`, eight sub-blocks of
32 columns. Q6_K: `(d * scale) * (code - 32)`, sixteen of 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fewbits.codecs.base import Codec, Grid, Params
from fewbits.codecs.ggml import Blocks, join_halves, split_halves
from fewbits.codecs.grids import UniformGrid
from fewbits.codecs.packing import join_fields, split_fields
from fewbits.codecs.pieces import fit_pieces
from fewbits.codecs.subscales import fit_lines, fit_scales, refit_lines, refit_scales
from fewbits.lazy import torch


class _K(Blocks):
    columns: ClassVar[int] = 256

    @property
    def name(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class WithMinimum(_K):
    """Q4_K and Q5_K."""

    bits: int
    subs: ClassVar[int] = 8

    @property
    def name(self) -> str:
        return f"Q{self.bits}_K"

    @property
    def integer_bits(self) -> int:  # type: ignore[override]
        return self.bits

    @property
    def block_bytes(self) -> int:
        return 16 + 32 * self.bits

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Any = None) -> Params:
        top = (1 << self.bits) - 1
        return fit_pieces(lambda p: fit_lines(p, top), w, importance, torch.float16, self.subs)

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, importance: torch.Tensor | None) -> Params:
        more = [codes, params["d"], params["dmin"], params["scales"], params["mins"]]
        return fit_pieces(refit_lines, w, importance, torch.float16, self.subs, more)

    def grid(self, params: Params, columns: int) -> Grid:
        offset = -(params["dmin"].float() * params["mins"])
        return UniformGrid(params["d"].float() * params["scales"], (1 << self.bits) - 1, columns, offset=offset)

    def join(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        fields = [params["d"], params["dmin"], join_sixes(params["scales"], params["mins"])]
        if self.bits == 5:
            fields.append(join_planes(codes >> 4, 1, 256))
        return join_fields(*fields, join_halves(codes & 15, 32))

    def split(self, blocks: torch.Tensor) -> tuple[torch.Tensor, Params]:
        head = [(2, torch.float16), (2, torch.float16), (12, torch.uint8)]
        if self.bits == 5:
            d, dmin, packed, fifth, low = split_fields(blocks, *head, (32, torch.uint8), (128, torch.uint8))
            codes = split_halves(low, 32) | (split_planes(fifth, 1, 256) << 4)
        else:
            d, dmin, packed, low = split_fields(blocks, *head, (128, torch.uint8))
            codes = split_halves(low, 32)
        scales, mins = split_sixes(packed)
        return codes, {"d": d, "dmin": dmin, "scales": scales, "mins": mins}


@dataclass(frozen=True)
class Q6_K(_K):
    integer_bits: ClassVar[int] = 6
    subs: ClassVar[int] = 16

    @property
    def block_bytes(self) -> int:
        return 210

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Any = None) -> Params:
        return fit_pieces(fit_scales, w, importance, torch.float16, self.subs)

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, importance: torch.Tensor | None) -> Params:
        more = [codes, params["d"], params["scales"]]
        return fit_pieces(refit_scales, w, importance, torch.float16, self.subs, more)

    def grid(self, params: Params, columns: int) -> Grid:
        return UniformGrid(params["d"].float() * params["scales"], 63, columns, zero=32.0)

    def join(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        return join_fields(join_halves(codes & 15, 64), join_planes(codes >> 4, 2, 128), params["scales"], params["d"])

    def split(self, blocks: torch.Tensor) -> tuple[torch.Tensor, Params]:
        low, high, scales, d = split_fields(blocks, (128, torch.uint8), (64, torch.uint8), (16, torch.int8),
                                            (2, torch.float16))
        return split_halves(low, 64) | (split_planes(high, 2, 128) << 4), {"d": d, "scales": scales}


def join_planes(high: torch.Tensor, bits: int, span: int) -> torch.Tensor:
    """High bits of codes: in every `span` columns, byte j holds those of columns j, j + 32, j + 64 …, lowest first."""
    parts = high.unflatten(-1, (-1, span // 32, 32))
    packed = parts[..., 0, :].clone()
    for i in range(1, span // 32):
        packed |= parts[..., i, :] << (i * bits)
    return packed.flatten(-2)


def split_planes(data: torch.Tensor, bits: int, span: int) -> torch.Tensor:
    """The inverse of `join_planes`."""
    runs = data.unflatten(-1, (-1, 32))
    return torch.stack([(runs >> (i * bits)) & ((1 << bits) - 1) for i in range(span // 32)], -2).flatten(-3)


def join_sixes(scales: torch.Tensor, mins: torch.Tensor) -> torch.Tensor:
    """Eight 6-bit scales and minimums in 12 bytes; the last four of each are cut into 4 low and 2 high bits."""
    first = scales[..., :4] | (scales[..., 4:] >> 4 << 6)
    second = mins[..., :4] | (mins[..., 4:] >> 4 << 6)
    return torch.cat([first, second, (scales[..., 4:] & 15) | (mins[..., 4:] << 4)], -1)


def split_sixes(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `join_sixes`."""
    first, second, third = packed.split(4, -1)
    return (torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], -1),
            torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], -1))


TYPES: dict[str, Codec] = {c.name: c for c in (WithMinimum(4), WithMinimum(5), Q6_K())}


def parse(name: str) -> Codec | None:
    return TYPES.get(name.upper())
