"""Fits of super-blocks: real scales of sub-blocks first, then rounded together, their neighbours tried, d refitted.

A piece has `subs` sub-blocks a unit. Tensors are `[units * subs, 1]` where they meet weights, `[units, subs]` where
they are stored, and `[units, 1]` for what a super-block has once; tries are stacked in front.

Where d is looked for: for the codes of the best real scales, the error of other scales is a parabola each. So many d
are compared at the cost of a few, and only the best meets the weights again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fewbits.codecs.base import Params
from fewbits.codecs.grids import Levels
from fewbits.codecs.pieces import TINY, Piece, invert, pick, rounded
from fewbits.codecs.search import (
    energy,
    extremes,
    nearest,
    probe,
    search_levels,
    search_scale,
    symmetric_starts,
    table_error,
)
from fewbits.lazy import torch

Change = Callable[[Any], Any]  # a tensor to a tensor

ROUNDS = 3
NEAR = (0, -1, 1, -2, 2)


def flat(x: torch.Tensor) -> torch.Tensor:
    """`[..., units, subs]` to `[..., units * subs, 1]`."""
    return x.flatten(-2).unsqueeze(-1)


def table(p: Piece, x: torch.Tensor) -> torch.Tensor:
    """The inverse of `flat`."""
    return x.squeeze(-1).unflatten(-1, (-1, p.subs))


def steps(s: torch.Tensor, most: int) -> torch.Tensor:
    """Sizes of d `[starts, units, 1]` that put the largest of the scales `[units, subs]` on a level near `most`, or on
    half of one; the first on `most`."""
    levels = s.new_tensor([most, most + 1, most + 0.5, *(most - i / 2 for i in range(1, 15))])
    return s.abs().amax(-1, True) / levels.view(-1, 1, 1)


def pick_units(tries: Sequence[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """Super-block by super-block the try of least error; a try is its error `[units, 1]` and tensors `[units, k]`."""
    best = tries[0]
    for other in tries[1:]:
        better = other[0] < best[0]
        best = tuple(torch.where(better, b, a) for a, b in zip(best, other, strict=True))
    return list(best)


# (d * scale) * level, signed scales -----------------------------------------------------------------------------------
def fit_scales(p: Piece, bits: int, scale_bits: int) -> Params:
    """Q3_K, Q6_K: even levels. Never worse than putting each sub-block's largest magnitude on the lowest level."""
    low, high, total = -(1 << (bits - 1)), (1 << (bits - 1)) - 1, energy(p)
    return _fit(p, scale_bits, extremes(p) / low,
                search_scale(p.unrounded(), low, high, symmetric_starts(p, bits), low),
                lambda s: probe(p, s, low, high, total)[0], lambda u: rounded(u, low, high))


def fit_level_scales(p: Piece, levels: Levels, starts: Sequence[float]) -> Params:
    """IQ4_XS: a table of levels. Never worse than putting each sub-block's largest magnitude on the first level."""
    return _fit(p, 6, extremes(p) / levels.table[0], search_levels(p.unrounded(), levels, starts),
                lambda s: torch.stack([table_error(p, one, levels) for one in s]), lambda u: nearest(u, levels))


def _fit(p: Piece, bits: int, plain: torch.Tensor, found: torch.Tensor, errors: Change, level: Change) -> Params:
    """Scales of `bits` bits. `plain` and `found` are real scales, `errors` takes stacked ones; `level` says which is
    nearest to values over scales."""
    least = -(1 << (bits - 1))
    plain = table(p, plain)
    d = p.kept(plain.gather(-1, plain.abs().argmax(-1, keepdim=True)) / least)
    scales = rounded(plain * invert(d), least, -1 - least)
    tries: list[tuple[torch.Tensor, ...]] = [(table(p, errors(flat(d * scales)[None])[0]).sum(-1, True), d, scales)]
    d, scales = _round_scales(p, least, table(p, found), level(p.x * invert(found)))
    near = d.new_tensor(NEAR).view(-1, 1, 1)
    for left in reversed(range(ROUNDS)):
        wanted = (scales + near).clamp_(least, -1 - least)
        error, scales = pick(table(p, errors(flat(d * wanted))), wanted)
        tries.append((error.sum(-1, True), d, scales))
        if left:
            d = _best_d(p, level(p.x * invert(flat(d * scales))), scales)
    _, d, scales = pick_units(tries)
    return {"d": p.stored(d), "scales": scales.to(torch.int8)}


def _round_scales(p: Piece, least: int, s: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """d and scales for the real scales `s`, whose levels are `q`; d of both signs are tried."""
    d = steps(s, -least)
    d = p.kept(torch.cat([d, -d]))
    scales = rounded(s * invert(d), least, -1 - least)
    lost = table(p, p.sum(p.weighted(q * q))) * (scales * d - s).square()
    index = lost.sum(-1, True).argmin(0, keepdim=True)
    return d.gather(0, index)[0], scales.gather(0, index.expand(1, *s.shape))[0]


def _best_d(p: Piece, q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    v = p.weighted(q)
    qx, qq = table(p, p.sum(v * p.x)), table(p, p.sum(v * q))
    return p.kept((scales * qx).sum(-1, True) / (scales * scales * qq).sum(-1, True).clamp_(min=TINY))


def refit_scales(p: Piece) -> Params:
    """d for given levels, where it beats the present one; `more`: levels, d, scales."""
    q, old, scales = (t.float() for t in p.more)
    q = q.reshape(p.x.shape)
    d = _best_d(p, q, scales)

    def error(d: torch.Tensor) -> torch.Tensor:
        return table(p, p.error(q * flat(d * scales) - p.x)).sum(-1, True)

    return {"d": torch.where(error(d) < error(old / p.step), p.stored(d), p.more[1]), "scales": p.more[2]}
