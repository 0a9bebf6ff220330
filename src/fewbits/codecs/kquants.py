"""K-quants of ggml: super-blocks of 256 columns whose sub-blocks have small integer scales under float16 ones.

Byte layouts are in docs/formats/k-quants.md. With minimum: `(d * scale) * code - dmin * minimum`, in Q4_K and Q5_K
eight sub-blocks of 32 columns, in Q2_K sixteen of 16. Symmetric: `(d * scale) * (code - middle)`, sixteen of 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fewbits.codecs import native
from fewbits.codecs.base import Codec, Grid, Params
from fewbits.codecs.ggml import Blocks, join_halves, split_halves
from fewbits.codecs.grids import UniformGrid
from fewbits.codecs.packing import join_fields, split_fields
from fewbits.codecs.pieces import fit_pieces
from fewbits.codecs.sublines import fit_lines, refit_lines
from fewbits.codecs.subscales import fit_scales, refit_scales
from fewbits.lazy import torch


@dataclass(frozen=True)
class _K(Blocks):
    bits: int
    columns: ClassVar[int] = 256
    settled: ClassVar[bool] = True
    subs: ClassVar[int]

    @property
    def name(self) -> str:
        return f"Q{self.bits}_K"

    @property
    def integer_bits(self) -> int:  # type: ignore[override]
        return self.bits


@dataclass(frozen=True)
class WithMinimum(_K):
    """Q4_K and Q5_K."""

    subs: ClassVar[int] = 8
    scale_bits: ClassVar[int] = 6
    linear: ClassVar[tuple[str, ...]] = ("d", "dmin")
    integers: ClassVar[dict[str, tuple[int, int]]] = {"scales": (0, 63), "mins": (0, 63)}

    @property
    def block_bytes(self) -> int:
        return 16 + 32 * self.bits

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Any = None) -> Params:
        return fit_pieces(lambda p: fit_lines(p, self.bits, self.scale_bits), w, importance, torch.float16, self.subs,
                          search=self.description)

    @property
    def description(self) -> native.Search:
        return native.SubLines(1 << self.bits, self.subs, self.scale_bits)

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
class Q2_K(WithMinimum):
    bits: int = 2
    subs: ClassVar[int] = 16
    scale_bits: ClassVar[int] = 4
    integers: ClassVar[dict[str, tuple[int, int]]] = {"scales": (0, 15), "mins": (0, 15)}

    @property
    def block_bytes(self) -> int:
        return 84

    def join(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        nibbles = params["scales"] | (params["mins"] << 4)
        return join_fields(nibbles, join_planes(codes, 2, 128), params["d"], params["dmin"])

    def split(self, blocks: torch.Tensor) -> tuple[torch.Tensor, Params]:
        nibbles, codes, d, dmin = split_fields(blocks, (16, torch.uint8), (64, torch.uint8), (2, torch.float16),
                                               (2, torch.float16))
        return split_planes(codes, 2, 128), {"d": d, "dmin": dmin, "scales": nibbles & 15, "mins": nibbles >> 4}


@dataclass(frozen=True)
class Symmetric(_K):
    """Q3_K and Q6_K: signed scales."""

    subs: ClassVar[int] = 16
    scale_bits: ClassVar[int]
    linear: ClassVar[tuple[str, ...]] = ("d",)

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Any = None) -> Params:
        return fit_pieces(lambda p: fit_scales(p, self.bits, self.scale_bits), w, importance, torch.float16, self.subs,
                          search=self.description)

    @property
    def description(self) -> native.Search:
        return native.SubScales(native.even("d", self.bits), self.subs, self.scale_bits)

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, importance: torch.Tensor | None) -> Params:
        more = [codes.to(torch.int8) - self.middle, params["d"], params["scales"]]
        return fit_pieces(refit_scales, w, importance, torch.float16, self.subs, more)

    def grid(self, params: Params, columns: int) -> Grid:
        top, zero = (1 << self.bits) - 1, float(self.middle)
        return UniformGrid(params["d"].float() * params["scales"], top, columns, zero=zero)


@dataclass(frozen=True)
class Q3_K(Symmetric):
    bits: int = 3
    scale_bits: ClassVar[int] = 6
    integers: ClassVar[dict[str, tuple[int, int]]] = {"scales": (-32, 31)}

    @property
    def block_bytes(self) -> int:
        return 110

    def join(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        scales = (params["scales"] + 32).to(torch.uint8)
        packed = [join_halves(scales & 15, 8), join_planes(scales >> 4, 2, 16, 4)]
        return join_fields(join_planes(codes >> 2, 1, 256), join_planes(codes & 3, 2, 128), *packed, params["d"])

    def split(self, blocks: torch.Tensor) -> tuple[torch.Tensor, Params]:
        third, low, nibbles, high, d = split_fields(blocks, (32, torch.uint8), (64, torch.uint8), (8, torch.uint8),
                                                    (4, torch.uint8), (2, torch.float16))
        scales = (split_halves(nibbles, 8) | (split_planes(high, 2, 16, 4) << 4)).to(torch.int8) - 32
        return split_planes(low, 2, 128) | (split_planes(third, 1, 256) << 2), {"d": d, "scales": scales}


@dataclass(frozen=True)
class Q6_K(Symmetric):
    bits: int = 6
    scale_bits: ClassVar[int] = 8
    integers: ClassVar[dict[str, tuple[int, int]]] = {"scales": (-128, 127)}

    @property
    def block_bytes(self) -> int:
        return 210

    def join(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        return join_fields(join_halves(codes & 15, 64), join_planes(codes >> 4, 2, 128), params["scales"], params["d"])

    def split(self, blocks: torch.Tensor) -> tuple[torch.Tensor, Params]:
        low, high, scales, d = split_fields(blocks, (128, torch.uint8), (64, torch.uint8), (16, torch.int8),
                                            (2, torch.float16))
        return split_halves(low, 64) | (split_planes(high, 2, 128) << 4), {"d": d, "scales": scales}


def join_planes(codes: torch.Tensor, bits: int, span: int, run: int = 32) -> torch.Tensor:
    """A few bits of each code: in every `span` columns, byte j holds those of columns j, j + run, j + 2 run …, lowest
    first."""
    found = native.planes(codes, bits, span // run, run)
    if found is not None:
        return found
    parts = codes.unflatten(-1, (-1, span // run, run))
    packed = parts[..., 0, :].clone()
    for i in range(1, span // run):
        packed |= parts[..., i, :] << (i * bits)
    return packed.flatten(-2)


def split_planes(data: torch.Tensor, bits: int, span: int, run: int = 32) -> torch.Tensor:
    """The inverse of `join_planes`."""
    found = native.unplanes(data, bits, span // run, run)
    if found is not None:
        return found
    runs = data.unflatten(-1, (-1, run))
    return torch.stack([(runs >> (i * bits)) & ((1 << bits) - 1) for i in range(span // run)], -2).flatten(-3)


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


TYPES: dict[str, Codec] = {c.name: c for c in (Q2_K(), Q3_K(), WithMinimum(4), WithMinimum(5), Q6_K())}


def parse(name: str) -> Codec | None:
    return TYPES.get(name.upper())
