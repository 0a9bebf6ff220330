"""Fits of super-blocks: real scales of sub-blocks first, then rounded together, their neighbours tried, d refitted.

A piece has `subs` sub-blocks a unit. Tensors are `[units * subs, 1]` where they meet weights, `[units, subs]` where
they are stored, and `[units, 1]` for what a super-block has once; tries are stacked in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from fewbits.codecs.base import Params
from fewbits.codecs.grids import Levels
from fewbits.codecs.lines import Moments, codes_on, line_errors, moments, search_line
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

ROUNDS = 3
NEAR_LINES = tuple(product((0, -1, 1), (0, -1, 1)))  # of scale and minimum
NEAR_SCALES = (0, -1, 1, -2, 2)
TOPS = (-32.0, -31.0, -30.0, -29.0, -28.0, 31.0, 30.0, 29.0)  # 6-bit scales for a super-block's largest


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(-2).unsqueeze(-1)


def _table(p: Piece, x: torch.Tensor) -> torch.Tensor:
    return x.squeeze(-1).unflatten(-1, (-1, p.subs))


# (d * scale) * code - dmin * minimum ----------------------------------------------------------------------------------
class _Lines(NamedTuple):
    error: torch.Tensor
    d: torch.Tensor
    dmin: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor


def fit_lines(p: Piece, bits: int, scale_bits: int) -> Params:
    """Q2_K, Q4_K, Q5_K. Never worse than each sub-block's line from its smallest (at most 0) to its largest value."""
    top, most = (1 << bits) - 1, (1 << scale_bits) - 1
    low, high = p.x.amin(-1, True).clamp_(max=0), p.x.amax(-1, True)
    tries = [_round_lines(p, top, most, (high - low).clamp_(min=0) / top, low)]
    now = _round_lines(p, top, most, *search_line(p, top, below_zero=True))
    near = now.d.new_tensor(NEAR_LINES).view(-1, 2, 1, 1)
    for last in (False,) * (ROUNDS - 1) + (True,):
        scales, mins = (now.scales + near[:, 0]).clamp_(0, most), (now.mins + near[:, 1]).clamp_(0, most)
        errors = _table(p, line_errors(p, _flat(now.d * scales), _flat(-(now.dmin * mins)), top))
        error, scales, mins = pick(errors, scales, mins)
        tries.append(_Lines(error.sum(-1, True), now.d, now.dmin, scales, mins))
        if not last:
            q = codes_on(p, invert(_flat(now.d * scales)), _flat(-(now.dmin * mins)), top)
            now = now._replace(scales=scales, mins=mins, **_best_pair(p, moments(p, q), scales, mins))
    _, d, dmin, scales, mins = _pick_units(tries)
    return {"d": p.stored(d), "dmin": p.stored(dmin), "scales": scales.to(torch.uint8), "mins": mins.to(torch.uint8)}


def _pick_units(tries: Sequence[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """Super-block by super-block the try of least error; a try is its error `[units, 1]` and tensors `[units, k]`."""
    best = tries[0]
    for other in tries[1:]:
        better = other[0] < best[0]
        best = tuple(torch.where(better, b, a) for a, b in zip(best, other, strict=True))
    return list(best)


def _round_lines(p: Piece, top: int, most: int, s: torch.Tensor, offset: torch.Tensor) -> _Lines:
    s, low = _table(p, s), -_table(p, offset)
    d, dmin = p.kept(s.amax(-1, True) / most), p.kept(low.amax(-1, True) / most)
    scales, mins = rounded(s * invert(d), 0, most), rounded(low * invert(dmin), 0, most)
    errors = line_errors(p, _flat(d * scales)[None], _flat(-(dmin * mins))[None], top)[0]
    return _Lines(_table(p, errors).sum(-1, True), d, dmin, scales, mins)


def _best_pair(p: Piece, m: Moments, scales: torch.Tensor, mins: torch.Tensor) -> dict[str, torch.Tensor]:
    """d and dmin by least squares for given codes, as stored."""
    w, x, _, q, qq, qx = (_table(p, t) for t in m)
    dd, mm, dm = (t.sum(-1, True) for t in (scales * scales * qq, mins * mins * w, scales * mins * q))
    dx, mx = (scales * qx).sum(-1, True), (mins * x).sum(-1, True)
    det = dd * mm - dm * dm
    ok = det > 1e-6 * dd * mm
    det = torch.where(ok, det, 1.0)
    d = torch.where(ok, (mm * dx - dm * mx) / det, dx / dd.clamp(min=TINY))
    return {"d": p.kept(d), "dmin": p.kept(torch.where(ok, (dm * dx - dd * mx) / det, 0.0))}


def refit_lines(p: Piece) -> Params:
    """d and dmin for given codes, where they beat the present ones; `more`: codes, d, dmin, scales, mins."""
    q, old, old_min, scales, mins = (t.float() for t in p.more)
    q = q.reshape(p.x.shape)
    new = _best_pair(p, moments(p, q), scales, mins)

    def error(d: torch.Tensor, dmin: torch.Tensor) -> torch.Tensor:
        return _table(p, p.error(q * _flat(d * scales) - _flat(dmin * mins) - p.x)).sum(-1, True)

    better = error(**new) < error(old / p.step, old_min / p.step)
    return {"d": torch.where(better, p.stored(new["d"]), p.more[1]),
            "dmin": torch.where(better, p.stored(new["dmin"]), p.more[2]), "scales": p.more[3], "mins": p.more[4]}


# (d * scale) * (code - middle) ----------------------------------------------------------------------------------------
def fit_scales(p: Piece, bits: int, scale_bits: int) -> Params:
    """Q3_K, Q6_K. Never worse than putting each sub-block's largest magnitude on the lowest level."""
    middle, least = 1 << (bits - 1), -(1 << (scale_bits - 1))
    low, high, total = -middle, middle - 1, energy(p)

    def errors(d: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return _table(p, probe(p, _flat(d * scales), low, high, total)[0])

    d, scales = _round_scales(p, least, extremes(p) / low)
    tries: list[tuple[torch.Tensor, ...]] = [(errors(d, scales[None])[0].sum(-1, True), d, scales)]
    d, scales = _round_scales(p, least, search_scale(p.unrounded(), low, high, symmetric_starts(p, bits), low))
    near = d.new_tensor(NEAR_SCALES).view(-1, 1, 1)
    for _ in range(ROUNDS):
        wanted = (scales + near).clamp_(least, -1 - least)
        error, scales = pick(errors(d, wanted), wanted)
        tries.append((error.sum(-1, True), d, scales))
        d = _best_d(p, rounded(p.x * invert(_flat(d * scales)), low, high), scales)
    _, d, scales = _pick_units(tries)
    return {"d": p.stored(d), "scales": scales.to(torch.int8)}


def _round_scales(p: Piece, least: int, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = _table(p, s)
    d = p.kept(s.gather(-1, s.abs().argmax(-1, keepdim=True)) / least)
    return d, rounded(s * invert(d), least, -1 - least)


def _best_d(p: Piece, q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    v = p.weighted(q)
    qx, qq = _table(p, p.sum(v * p.x)), _table(p, p.sum(v * q))
    return p.kept((scales * qx).sum(-1, True) / (scales * scales * qq).sum(-1, True).clamp_(min=TINY))


def refit_scales(p: Piece, bits: int) -> Params:
    """d for given codes, where it beats the present one; `more`: codes, d, scales."""
    q, old, scales = (t.float() for t in p.more)
    q = q.reshape(p.x.shape) - (1 << (bits - 1))
    d = _best_d(p, q, scales)

    def error(d: torch.Tensor) -> torch.Tensor:
        return _table(p, p.error(q * _flat(d * scales) - p.x)).sum(-1, True)

    return {"d": torch.where(error(d) < error(old / p.step), p.stored(d), p.more[1]), "scales": p.more[2]}


# (d * scale) * level --------------------------------------------------------------------------------------------------
def fit_level_scales(p: Piece, table: Levels, starts: Sequence[float]) -> Params:
    """IQ4_XS. Never worse than putting each sub-block's largest magnitude on the first level."""

    def errors(d: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return torch.stack([_table(p, table_error(p, _flat(d * s), table)) for s in scales])

    def rounding(s: torch.Tensor, top: float) -> tuple[torch.Tensor, ...]:
        """`s` `[units, subs]` with the largest magnitude on the scale `top`."""
        d = p.kept(s.gather(-1, s.abs().argmax(-1, keepdim=True)) / top)
        scales = rounded(s * invert(d), -32, 31)
        return errors(d, scales[None])[0].sum(-1, True), d, scales

    found = _table(p, search_levels(p.unrounded(), table, starts))
    tries = [rounding(_table(p, extremes(p) / table.table[0]), -32)]
    now = _pick_units([rounding(found, top) for top in TOPS])
    near = found.new_tensor(NEAR_SCALES).view(-1, 1, 1)
    for _ in range(ROUNDS):
        _, d, scales = now
        wanted = (scales + near).clamp_(-32, 31)
        error, scales = pick(errors(d, wanted), wanted)
        tries.append((error.sum(-1, True), d, scales))
        d = _best_d(p, nearest(p.x * invert(_flat(d * scales)), table), scales)
        now = [error, d, scales]
    _, d, scales = _pick_units(tries)
    return {"d": p.stored(d), "scales": scales.to(torch.int8)}


def refit_level_scales(p: Piece) -> Params:
    """d for given levels, where it beats the present one; `more`: levels, d, scales."""
    q, old, scales = (t.float() for t in p.more)
    q = q.reshape(p.x.shape)
    d = _best_d(p, q, scales)

    def error(d: torch.Tensor) -> torch.Tensor:
        return _table(p, p.error(q * _flat(d * scales) - p.x)).sum(-1, True)

    return {"d": torch.where(error(d) < error(old / p.step), p.stored(d), p.more[1]), "scales": p.more[2]}
