"""Fits of super-blocks whose sub-blocks have a small integer scale and minimum: see subscales.

d and dmin may be negative, both at once: then it is the upper ends of the sub-blocks that have few places to lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from fewbits.codecs.base import Params
from fewbits.codecs.lines import Moments, codes_on, least_squares, line_errors, moments, search_line
from fewbits.codecs.pieces import TINY, Piece, invert, pick, rounded
from fewbits.codecs.subscales import ROUNDS, flat, pick_units, steps, table
from fewbits.lazy import torch

NEAR = tuple(product((0, -1, 1), (0, -1, 1)))  # of scale and minimum
MINIMA = 3  # dmin that are tried with every d


class _Lines(NamedTuple):
    error: torch.Tensor
    d: torch.Tensor
    dmin: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor


def fit_lines(p: Piece, bits: int, scale_bits: int) -> Params:
    """Q2_K, Q4_K, Q5_K. Never worse than each sub-block's line from its smallest (at most 0) to its largest value."""
    top, most = (1 << bits) - 1, (1 << scale_bits) - 1
    tries = [_plain(p, top, most), *_descend(p, top, most, _start(p, top, most))]
    _, d, dmin, scales, mins = pick_units(tries)
    return {"d": p.stored(d), "dmin": p.stored(dmin), "scales": scales.to(torch.uint8), "mins": mins.to(torch.uint8)}


def _plain(p: Piece, top: int, most: int) -> _Lines:
    low = p.x.amin(-1, True).clamp_(max=0)
    s, low = table(p, (p.x.amax(-1, True) - low).clamp_(min=0) / top), -table(p, low)
    d, dmin = p.kept(s.amax(-1, True) / most), p.kept(low.amax(-1, True) / most)
    scales, mins = rounded(s * invert(d), 0, most), rounded(low * invert(dmin), 0, most)
    errors = line_errors(p, flat(d * scales)[None], flat(-(dmin * mins))[None], top)[0]
    return _Lines(table(p, errors).sum(-1, True), d, dmin, scales, mins)


def _descend(p: Piece, top: int, most: int, now: _Lines) -> Iterator[_Lines]:
    """The neighbours of every scale and minimum, then d and dmin for the new codes, and so on."""
    near = now.d.new_tensor(NEAR).view(-1, 2, 1, 1)
    for left in reversed(range(ROUNDS)):
        scales, mins = (now.scales + near[:, 0]).clamp_(0, most), (now.mins + near[:, 1]).clamp_(0, most)
        errors = table(p, line_errors(p, flat(now.d * scales), flat(-(now.dmin * mins)), top))
        error, scales, mins = pick(errors, scales, mins)
        yield now._replace(error=error.sum(-1, True), scales=scales, mins=mins)
        if left:
            q = codes_on(p, invert(flat(now.d * scales)), flat(-(now.dmin * mins)), top)
            now = _Lines(error, *_best_pair(p, moments(p, q), scales, mins), scales, mins)


# where d and dmin are looked for --------------------------------------------------------------------------------------
def _start(p: Piece, top: int, most: int) -> _Lines:
    """The best of many d and dmin of both signs, with the codes of the best real lines."""
    s, offset = search_line(p, top, below_zero=True)
    q = codes_on(p, invert(s), offset, top)
    unused = q.amin(-1, True)
    q -= torch.where(offset + unused * s <= 0, unused, 0.0)  # the lowest code in use is 0, as most quantizers have it
    upright, tries = moments(p, q), []
    s, offset, _ = least_squares(upright, below_zero=True)
    for sign, m, low in ((1, upright, -offset), (-1, _flipped(upright, top), (offset + top * s).clamp_(min=0))):
        at = _at(Moments(*(table(p, t) for t in m)), table(p, s), table(p, low))
        ds, dmins = steps(at.s, most), steps(at.low, most)
        shift = rounded(at.low * invert(dmins), 0, most) * dmins - at.low
        fixed = shift * (shift * (at.m.w - at.m.q * at.slope) + at.pull)
        for dmin in dmins.gather(0, fixed.sum(-1, True).topk(MINIMA, 0, largest=False).indices):
            error, scales, mins = _round_lines(at, ds, dmin, most)
            error, index = error.sum(-1, True).min(0, keepdim=True)
            d, wide = ds.gather(0, index)[0], index.expand(1, *at.s.shape)
            tries.append(_Lines(error[0], p.kept(sign * d), p.kept(sign * dmin), scales.gather(0, wide)[0],
                                mins.gather(0, wide)[0]))
    return _Lines(*pick_units(tries))


def _flipped(m: Moments, top: int) -> Moments:
    """Of -x with codes `top` - q."""
    q = top * m.w - m.q
    return m._replace(x=-m.x, q=q, qq=top * (q - m.q) + m.qq, qx=m.qx - top * m.x)


class _Parabola(NamedTuple):
    """How the error of sub-blocks `[units, subs]` changes around a line, while codes stay as they are."""

    m: Moments
    s: torch.Tensor
    low: torch.Tensor  # values are s * q - low
    error: torch.Tensor
    grow: torch.Tensor  # by s
    pull: torch.Tensor  # by low; both are 0 where nothing keeps the line from being the best
    slope: torch.Tensor  # of the best s by low


def _at(m: Moments, s: torch.Tensor, low: torch.Tensor) -> _Parabola:
    grow, pull = 2 * (s * m.qq - low * m.q - m.qx), 2 * (m.x - s * m.q + low * m.w)
    error = m.xx + s * (grow / 2 - m.qx) + low * (pull / 2 + m.x)
    return _Parabola(m, s, low, error, grow, pull, m.q / m.qq.clamp(min=TINY))


def _round_lines(at: _Parabola, d: torch.Tensor, dmin: torch.Tensor, most: int) -> list[torch.Tensor]:
    """Error, scales and minimums for each `d` `[starts, units, 1]`: the three nearest minimums are tried, with the best
    scale for each."""
    near, free = rounded(at.low * invert(dmin), 0, most), at.s - at.grow / (2 * at.m.qq.clamp(min=TINY))
    best: list[torch.Tensor] = []
    for step in (0, -1, 1):
        mins = (near + step).clamp_(0, most)
        lower = mins * dmin - at.low
        scales = rounded((free + at.slope * lower) * invert(d), 0, most)
        wider = scales * d - at.s
        error = at.error + lower * (lower * at.m.w + at.pull)
        error = error + wider * (wider * at.m.qq - 2 * lower * at.m.q + at.grow)
        tried = [error, scales, mins.expand(scales.shape)]
        best = [torch.where(error < best[0], t, b) for t, b in zip(tried, best, strict=True)] if best else tried
    return best


# parameters for codes that are given ----------------------------------------------------------------------------------
def _best_pair(p: Piece, m: Moments, scales: torch.Tensor, mins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """d and dmin by least squares for given codes, as stored."""
    w, x, _, q, qq, qx = (table(p, t) for t in m)
    dd, mm, dm = (t.sum(-1, True) for t in (scales * scales * qq, mins * mins * w, scales * mins * q))
    dx, mx = (scales * qx).sum(-1, True), (mins * x).sum(-1, True)
    det = dd * mm - dm * dm
    ok = det > 1e-6 * dd * mm
    det = torch.where(ok, det, 1.0)
    d = torch.where(ok, (mm * dx - dm * mx) / det, dx / dd.clamp(min=TINY))
    return p.kept(d), p.kept(torch.where(ok, (dm * dx - dd * mx) / det, 0.0))


def refit_lines(p: Piece) -> Params:
    """d and dmin for given codes, where they beat the present ones; `more`: codes, d, dmin, scales, mins."""
    q, old, old_min, scales, mins = (t.float() for t in p.more)
    q = q.reshape(p.x.shape)
    d, dmin = _best_pair(p, moments(p, q), scales, mins)

    def error(d: torch.Tensor, dmin: torch.Tensor) -> torch.Tensor:
        return table(p, p.error(q * flat(d * scales) - flat(dmin * mins) - p.x)).sum(-1, True)

    better = error(d, dmin) < error(old / p.step, old_min / p.step)
    return {"d": torch.where(better, p.stored(d), p.more[1]), "dmin": torch.where(better, p.stored(dmin), p.more[2]),
            "scales": p.more[3], "mins": p.more[4]}
