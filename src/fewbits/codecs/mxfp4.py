"""MXFP4, the 4-bit floats of OCP Microscaling: 32 columns share a power of two (e8m0), levels are e2m1 floats.

As in ggml, levels are doubled to be integers and scales halved: `2^(exponent - 128) * level`. A block is the exponent's
byte, then nibbles, column j in the low and column j + 16 in the high half of byte j.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from fewbits.codecs.base import Grid, Params
from fewbits.codecs.ggml import Blocks, join_halves, split_halves
from fewbits.codecs.grids import Levels, TableGrid, levels
from fewbits.codecs.packing import join_fields, split_fields
from fewbits.codecs.pieces import TINY, Piece, fit_pieces, invert
from fewbits.codecs.search import nearest
from fewbits.lazy import torch

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # by code; bit 3 is the sign
LARGEST = 252  # of the exponents that we produce: 12 * 2^(252 - 128) is finite


@cache
def table() -> Levels:
    return levels(torch.tensor(E2M1, dtype=torch.float32))


def power(exponent: torch.Tensor) -> torch.Tensor:
    """2^(exponent - 128) as float32; exponents 0 and 1 give denormals."""
    e = exponent.int()
    return torch.where(e < 2, (1 << 21) << e.clamp(max=1), (e - 1) << 23).view(torch.float32)


@dataclass(frozen=True)
class MXFP4(Blocks):
    columns: ClassVar[int] = 32
    integer_bits: ClassVar[int] = 4
    block_bytes: ClassVar[int] = 17

    @property
    def name(self) -> str:
        return "MXFP4"

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Any = None) -> Params:
        return fit_pieces(_fit, w, importance, torch.float32)

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, importance: torch.Tensor | None) -> Params:
        return fit_pieces(_refit, w, importance, torch.float32, more=[params["exponent"], codes])

    def grid(self, params: Params, columns: int) -> Grid:
        return TableGrid(power(params["exponent"]), table(), columns)

    def join(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        return join_fields(params["exponent"], join_halves(codes, 16))

    def split(self, blocks: torch.Tensor) -> tuple[torch.Tensor, Params]:
        exponent, nibbles = split_fields(blocks, (1, torch.uint8), (16, torch.uint8))
        return split_halves(nibbles, 16), {"exponent": exponent}


def _fit(p: Piece) -> Params:
    """The best of all exponents.

    From the one whose level 8 reaches the largest magnitude (above it levels are only lost) downwards, until what is
    cut off beyond level 12 costs more than the best so far.
    """
    exponent = (torch.frexp(p.peak)[1] + 125).clamp_(0, LARGEST)  # 8 * 2^(exponent - 128) = 2^(floor(log2 peak) + 1)
    best, least = torch.zeros_like(exponent), p.sum(p.weighted(p.x * p.x))
    while True:
        s = power(exponent) / p.step
        error = p.error((nearest(p.x * invert(s), table()) * s).sub_(p.x))
        better = error < least
        best, least = torch.where(better, exponent, best), torch.where(better, error, least)
        cut = p.error(p.x.clamp(-12 * s, 12 * s).sub_(p.x))
        if bool(((cut >= least) | (exponent == 0)).all()):
            return {"exponent": best.to(torch.uint8)}
        exponent = (exponent - 1).clamp_(min=0)


def _refit(p: Piece) -> Params:
    """The error is a parabola in the scale: the best power of two is next to its minimum."""
    old, q = p.more[0].int(), table().table.to(p.x.device)[p.more[1].long()]
    v = p.weighted(q)
    s = p.sum(v * p.x) / p.sum(v * q).clamp_(min=TINY) * p.peak
    below = (torch.frexp(s.clamp(min=0))[1] + 127).clamp_(0, LARGEST)
    tries = torch.stack([old, below, (below + 1).clamp_(max=LARGEST)])
    errors = torch.stack([p.error(q * (power(e) / p.step) - p.x) for e in tries])
    return {"exponent": tries.gather(0, errors.argmin(0, keepdim=True))[0].to(torch.uint8)}


TYPES = {"MXFP4": MXFP4()}


def parse(name: str) -> MXFP4 | None:
    return TYPES.get(name.upper())
