"""Fits of super-blocks: real scales of sub-blocks first, then rounded together, their neighbours tried, d refitted.

A piece has `subs` sub-blocks a unit: sums over sub-blocks are `[units * subs, 1]`, `_table` makes them `[units, subs]`.
"""

from __future__ import annotations

from fewbits.codecs.base import Params
from fewbits.codecs.search import (SHIFTS, STRETCHES, TINY, Moments, Piece, codes_on, energy, invert, line_error, probe,
                                   search_line, search_scale, symmetric_starts)
from fewbits.lazy import torch



def _table(p: Piece, x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, p.subs)


def _column(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, 1)
