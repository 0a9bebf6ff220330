"""Ternary and binary types of ggml: one fp16 scale, values -d, 0, d (TQ1_0, TQ2_0) or -d, d (Q1_0).

For these the best scale is known exactly, with any importances: see `fit_signs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fewbits.codecs.base import Grid, Params
from fewbits.codecs.ggml import Blocks
from fewbits.codecs.grids import UniformGrid
from fewbits.codecs.kquants import join_planes, split_planes
from fewbits.codecs.packing import join_fields, pack_bits, split_fields, unpack_bits
from fewbits.codecs.pieces import Piece, fit_pieces
from fewbits.codecs.search import refit_scale
from fewbits.lazy import torch

# A block of TQ1_0: (bytes, columns a byte), the columns of a byte that many bytes apart.
RUNS = ((32, 5), (16, 5), (4, 4))
POWERS = (81, 27, 9, 3, 1)


@dataclass(frozen=True)
class _Ternary(Blocks):
    """`d * (code - 1)`."""

    columns: ClassVar[int] = 256
    linear: ClassVar[tuple[str, ...]] = ("d",)
    integer_bits: ClassVar[int] = 2

    @property
    def name(self) -> str:
        return type(self).__name__

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Any = None) -> Params:
        return fit_pieces(lambda p: fit_signs(p, zeros=True), w, importance, torch.float16)

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, importance: torch.Tensor | None) -> Params:
        return {"d": refit_scale(w, codes, params["d"], 1.0, importance)}

    def grid(self, params: Params, columns: int) -> Grid:
        return UniformGrid(params["d"].float(), 2, columns, zero=1.0)


class TQ2_0(_Ternary):
    """64 bytes of 2-bit codes, then d. Of every 128 columns byte j holds j, j + 32, j + 64, j + 96, from bit 0 up.

    A block can hold code 3, twice d, which is read as it is and never produced.
    """

    block_bytes: ClassVar[int] = 66

    def join(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        return join_fields(join_planes(codes, 2, 128), params["d"])

    def split(self, blocks: torch.Tensor) -> tuple[torch.Tensor, Params]:
        data, d = split_fields(blocks, (64, torch.uint8), (2, torch.float16))
        return split_planes(data, 2, 128), {"d": d}


class TQ1_0(_Ternary):
    """48 bytes of five columns, 4 of four, then d.

    The codes of a byte are the digits of a number in base 3, the first column's the highest; the byte is that number
    times 256/243, rounded up: multiplied by 3, its overflow beyond eight bits is the first digit. Bytes that stand for
    no number are read as the nearest below that does.
    """

    block_bytes: ClassVar[int] = 54

    def join(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        fields = []
        for part, (size, count) in zip(codes.split([a * b for a, b in RUNS], -1), RUNS, strict=True):
            digits = part.unflatten(-1, (count, size)).int()
            powers = torch.tensor(POWERS[:count], dtype=torch.int32, device=codes.device).unsqueeze(-1)
            fields.append((((digits * powers).sum(-2) * 256 + 242) // 243).to(torch.uint8))
        return join_fields(*fields, params["d"])

    def split(self, blocks: torch.Tensor) -> tuple[torch.Tensor, Params]:
        *runs, d = split_fields(blocks, *((size, torch.uint8) for size, _ in RUNS), (2, torch.float16))
        parts = []
        for data, (_, count) in zip(runs, RUNS, strict=True):
            for power in POWERS[:-count - 1:-1]:  # uint8 products keep what lies below the digits already read
                parts.append((data * power).int().mul(3).bitwise_right_shift(8).to(torch.uint8))
        return torch.cat(parts, -1), {"d": d}


@dataclass(frozen=True)
class Q1_0(Blocks):
    """`d` where the code is 1, `-d` where it is 0. A block is d, then bit i of the stream is column i."""

    columns: ClassVar[int] = 128
    linear: ClassVar[tuple[str, ...]] = ("d",)
    integer_bits: ClassVar[int] = 1
    block_bytes: ClassVar[int] = 18

    @property
    def name(self) -> str:
        return "Q1_0"

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Any = None) -> Params:
        return fit_pieces(lambda p: fit_signs(p, zeros=False), w, importance, torch.float16)

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, importance: torch.Tensor | None) -> Params:
        return {"d": refit_scale(w, codes.float() * 2, params["d"], 1.0, importance)}

    def grid(self, params: Params, columns: int) -> Grid:
        return UniformGrid(params["d"].float(), 1, columns, zero=0.5, factor=2.0)

    def join(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        return join_fields(params["d"], pack_bits(codes, 1))

    def split(self, blocks: torch.Tensor) -> tuple[torch.Tensor, Params]:
        d, bits = split_fields(blocks, (2, torch.float16), (16, torch.uint8))
        return unpack_bits(bits, 1, 128), {"d": d}


def fit_signs(p: Piece, zeros: bool) -> Params:
    """The best scale of all.

    The weights that are not put on zero are the k largest for some k, and for those the best scale is their (weighted)
    mean magnitude, which lowers the error by `sum(w |x|)^2 / sum(w)`: all k are tried. Without `zeros` k is all.
    """
    size, order = torch.sort(p.x.abs(), -1, descending=True)
    weight = torch.ones_like(size) if p.weight is None else p.weight.gather(-1, order)
    above, count = (size * weight).cumsum(-1), weight.cumsum(-1)
    k = (above * above / count).argmax(-1, keepdim=True) if zeros else torch.full_like(order[:, :1], size.shape[-1] - 1)
    return {"d": p.stored(above.gather(-1, k) / count.gather(-1, k))}


TYPES: dict[str, Blocks] = {c.name: c for c in (TQ1_0(), TQ2_0(), Q1_0())}


def parse(name: str) -> Blocks | None:
    return TYPES.get(name.upper())
