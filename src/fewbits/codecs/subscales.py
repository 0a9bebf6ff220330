"""Fits of super-blocks: real scales of sub-blocks first, then rounded together, their neighbours tried, d refitted.

A piece has `subs` sub-blocks a unit. Tensors are `[units * subs, 1]` where they meet weights, `[units, subs]` where they
are stored, and `[units, 1]` for what a super-block has once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from fewbits.codecs.base import Params
from fewbits.codecs.search import (
    SHIFTS,
    STRETCHES,
    TINY,
    Moments,
    Piece,
    codes_on,
    energy,
    invert,
    line_error,
    probe,
    search_line,
    search_scale,
    symmetric_starts,
)
from fewbits.lazy import torch

ROUNDS = 3
NEAR_LINES = tuple(product((0, -1, 1), (0, -1, 1)))
NEAR_SCALES = (0, -1, 1, -2, 2)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, 1)


def _better(old: Any, new: Any) -> Any:
    """The better of two fits, unit by unit."""
    if old is None:
        return new
    better = new.error < old.error
    return type(old)(*(torch.where(better, getattr(new, f.name), getattr(old, f.name)) for f in fields(old)))


# (d * scale) * code - dmin * minimum ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Lines:
    d: torch.Tensor
    dmin: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor
    error: torch.Tensor

    def params(self, p: Piece) -> Params:
        return {"d": p.stored(self.d), "dmin": p.stored(self.dmin), "scales": self.scales.to(torch.uint8),
                "mins": self.mins.to(torch.uint8)}


def fit_lines(p: Piece, top: int) -> Params:
    """Q4_K, Q5_K. Never worse than each sub-block's line from its smallest (at most 0) to its largest value."""
    m = Moments(p)
    low, high = p.x.amin(-1, True).clamp(max=0), p.x.amax(-1, True)
    plain = ((high - low).clamp(min=0) / top, low)
    found = search_line(p, top, STRETCHES, SHIFTS, below_zero=True)
    best = None
    for s, offset in (plain, (found.s, found.offset)):
        for near in ((0, 0),), NEAR_LINES:
            if s is plain[0] and near is NEAR_LINES:
                continue
            best = _settle_lines(p, top, m, s.reshape(-1, p.subs), offset.reshape(-1, p.subs), near, best)
    return best.params(p)


def _settle_lines(p: Piece, top: int, m: Moments, s: torch.Tensor, offset: torch.Tensor, near: Any,
                  best: _Lines | None) -> _Lines:
    d, dmin = p.kept(s.amax(-1, True) / 63), p.kept((-offset).amax(-1, True) / 63)
    scales, mins = (s * invert(d)).round_().clamp_(0, 63), (-offset * invert(dmin)).round_().clamp_(0, 63)
    for _ in range(ROUNDS if len(near) > 1 else 1):
        tries = []
        for i, j in near:
            a, b = (scales + i).clamp_(0, 63), (mins + j).clamp_(0, 63)
            s_, o = _flat(d * a), _flat(-(dmin * b))
            tries.append((line_error(p, s_, o, codes_on(p, s_, o, top)).reshape(-1, p.subs), a, b))
        error, scales, mins = _least(tries)
        best = _better(best, _Lines(d, dmin, scales, mins, error.sum(-1, True)))
        if len(near) > 1:
            q = codes_on(p, _flat(d * scales), _flat(-(dmin * mins)), top)
            d, dmin = _best_pair(p, q, m, scales, mins)
    assert best is not None
    return best


def _least(tries: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    least = tries[0]
    for other in tries[1:]:
        better = other[0] < least[0]
        least = tuple(torch.where(better, b, a) for a, b in zip(least, other, strict=True))
    return least


def _best_pair(p: Piece, q: torch.Tensor, m: Moments, scales: torch.Tensor,
               mins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """d and dmin by least squares for given codes, as stored."""
    v = p.weighted(q)
    b, a, c = (t.reshape(-1, p.subs) for t in (p.sum(v), p.sum(v * q), p.sum(v.mul_(p.x))))
    w, x = m.w.reshape(-1, p.subs), m.x.reshape(-1, p.subs)
    dd, mm = (scales * scales * a).sum(-1, True), (mins * mins * w).sum(-1, True)
    dm = (scales * mins * b).sum(-1, True)
    dx, mx = (scales * c).sum(-1, True), (mins * x).sum(-1, True)
    det = dd * mm - dm * dm
    ok = det > 1e-6 * dd * mm
    det = torch.where(ok, det, 1.0)
    d = torch.where(ok, (mm * dx - dm * mx) / det, dx / dd.clamp(min=TINY))
    dmin = torch.where(ok, (dm * dx - dd * mx) / det, 0.0)
    return p.kept(d), p.kept(dmin)


def refit_lines(p: Piece) -> Params:
    """d and dmin for given codes, where they beat the present ones; `more`: codes, d, dmin, scales, mins."""
    q, old, old_min, scales, mins = (t.float() for t in p.more)
    q = q.reshape(p.x.shape)
    d, dmin = _best_pair(p, q, Moments(p), scales, mins)

    def error(d: torch.Tensor, dmin: torch.Tensor) -> torch.Tensor:
        return line_error(p, _flat(d * scales), _flat(-(dmin * mins)), q).reshape(-1, p.subs).sum(-1, True)

    better = error(d, dmin) < error(old / p.step, old_min / p.step)
    return {"d": torch.where(better, p.stored(d), p.more[1]), "dmin": torch.where(better, p.stored(dmin), p.more[2]),
            "scales": p.more[3], "mins": p.more[4]}


# (d * scale) * (code - 32) ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Scales:
    d: torch.Tensor
    scales: torch.Tensor
    error: torch.Tensor

    def params(self, p: Piece) -> Params:
        return {"d": p.stored(self.d), "scales": self.scales.to(torch.int8)}


def fit_scales(p: Piece, bits: int = 6) -> Params:
    """Q6_K. Never worse than putting each sub-block's largest magnitude on the lowest level."""
    middle = 1 << (bits - 1)
    low, high = -middle, middle - 1
    total = energy(p)
    extreme = p.x.gather(-1, p.x.abs().argmax(-1, keepdim=True))
    found, _ = search_scale(p.unrounded(), low, high, symmetric_starts(bits), -middle)
    best = _settle_scales(p, low, high, total, (extreme / low).reshape(-1, p.subs), (0,), None)
    return _settle_scales(p, low, high, total, found.reshape(-1, p.subs), NEAR_SCALES, best).params(p)


def _settle_scales(p: Piece, low: int, high: int, total: torch.Tensor, s: torch.Tensor, near: Any,
                   best: _Scales | None) -> _Scales:
    d = p.kept(s.gather(-1, s.abs().argmax(-1, keepdim=True)) / -128)
    scales = (s * invert(d)).round_().clamp_(-128, 127)
    for _ in range(ROUNDS if len(near) > 1 else 1):
        tries = []
        for i in near:
            a = (scales + i).clamp_(-128, 127)
            tries.append((probe(p, _flat(d * a), low, high, total)[0].reshape(-1, p.subs), a))
        error, scales = _least(tries)
        best = _better(best, _Scales(d, scales, error.sum(-1, True)))
        q = torch.round(p.x * invert(_flat(d * scales))).clamp_(low, high)
        d = _best_d(p, q, scales)
    assert best is not None
    return best


def _best_d(p: Piece, q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    v = p.weighted(q)
    qx, qq = p.sum(v * p.x).reshape(-1, p.subs), p.sum(v.mul_(q)).reshape(-1, p.subs)
    return p.kept((scales * qx).sum(-1, True) / (scales * scales * qq).sum(-1, True).clamp(min=TINY))


def refit_scales(p: Piece) -> Params:
    """d for given codes, where it beats the present one; `more`: codes, d, scales."""
    q, old, scales = (t.float() for t in p.more)
    q = q.reshape(p.x.shape) - 32
    d = _best_d(p, q, scales)

    def error(d: torch.Tensor) -> torch.Tensor:
        s = _flat(d * scales)
        return line_error(p, s, torch.zeros_like(s), q).reshape(-1, p.subs).sum(-1, True)

    return {"d": torch.where(error(d) < error(old / p.step), p.stored(d), p.more[1]), "scales": p.more[2]}
