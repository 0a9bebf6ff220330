"""The search for a scale and a real offset: values `s * q + offset`, codes q from 0 to `top`.

Starts are stacked: `[starts, units, 1]`.
"""

from __future__ import annotations

from typing import NamedTuple

from fewbits.codecs.base import Params
from fewbits.codecs.pieces import TINY, Piece, invert, pick, rounded
from fewbits.lazy import torch

STRETCHES = (0.6, 0.69, 0.78, 0.87, 0.96, 1.05)  # parts of a unit's range that starts cover
FINE_STRETCHES = (0.6, 0.69, 0.77, 0.84, 0.89, 0.93, 0.97, 1.0, 1.03, 1.06)  # with more than 16 levels
SHIFTS = (0.0, 0.25, -0.25, 0.5, -0.5)  # of its middle, in steps


class Moments(NamedTuple):
    """Weighted sums over each unit: of nothing, x, x^2, q, q^2, q x."""

    w: torch.Tensor
    x: torch.Tensor
    xx: torch.Tensor
    q: torch.Tensor
    qq: torch.Tensor
    qx: torch.Tensor


def fixed_moments(p: Piece) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Those that don't depend on codes."""
    v = p.weighted(p.x)
    count = torch.full_like(p.peak[:1], p.x.shape[-1]) if p.weight is None else p.sum(p.weight)
    return count.expand(len(v), 1), p.sum(v), p.sum(v * p.x)


def code_moments(p: Piece, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    v = p.weighted(q)
    return p.sum(v), p.sum(v * q), p.sum(v * p.x)


def moments(p: Piece, q: torch.Tensor) -> Moments:
    return Moments(*fixed_moments(p), *code_moments(p, q))


def stacked_moments(p: Piece, fixed: tuple[torch.Tensor, torch.Tensor, torch.Tensor], s: torch.Tensor,
                    offset: torch.Tensor, top: int) -> Moments:
    """With the nearest codes on each of the stacked lines."""
    inverse = invert(s)
    sums = [code_moments(p, codes_on(p, inverse[i], offset[i], top)) for i in range(len(s))]
    return Moments(*fixed, *(torch.stack(t) for t in zip(*sums, strict=True)))


def codes_on(p: Piece, inverse: torch.Tensor, offset: torch.Tensor, top: int) -> torch.Tensor:
    """Nearest codes at scale 1/inverse, as float32."""
    return rounded((p.x - offset).mul_(inverse), 0, top)


def line_errors(p: Piece, s: torch.Tensor, offset: torch.Tensor, top: int) -> torch.Tensor:
    """With nearest codes on each of the stacked lines."""
    inverse = invert(s)
    return torch.stack([p.error(codes_on(p, inverse[i], offset[i], top).mul_(s[i]).add_(offset[i]).sub_(p.x))
                        for i in range(len(s))])


def least_squares(m: Moments, below_zero: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best scale and offset for given codes, and their error; with `below_zero` the offset is at most 0."""
    det = m.w * m.qq - m.q * m.q
    ok = det > 1e-6 * m.w * m.qq
    det = torch.where(ok, det, 1.0)
    s, offset = (m.w * m.qx - m.q * m.x) / det, (m.qq * m.x - m.q * m.qx) / det
    alone = ~ok | (offset > 0) if below_zero else ~ok
    s = torch.where(alone, m.qx / m.qq.clamp(min=TINY), s)
    offset = torch.where(alone, 0.0, offset)
    return s, offset, torch.where(alone, m.xx - s * m.qx, m.xx - s * m.qx - offset * m.x)


def search_line(p: Piece, top: int, below_zero: bool, rounds: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset `[units, 1]`, normalised, not yet rounded to storage: least squares from several starts."""
    fixed = fixed_moments(p)
    low, high = p.x.amin(-1, True), p.x.amax(-1, True)
    if below_zero:
        low = low.clamp_(max=0)
        high = torch.maximum(high, low)
    grid = [(stretch, shift) for stretch in (FINE_STRETCHES if top > 15 else STRETCHES) for shift in SHIFTS]
    stretches, shifts = (low.new_tensor(t).view(-1, 1, 1) for t in zip(*grid, strict=True))
    s = (high - low) * (stretches / top)
    offset = (high + low) / 2 - s * (top / 2 + shifts)
    if below_zero:
        offset = offset.clamp_(max=0)
    found = []
    for _ in range(rounds):
        s, offset, error = least_squares(stacked_moments(p, fixed, s, offset, top), below_zero)
        found.append((error, s, offset))
    _, s, offset = pick(*(torch.cat(t) for t in zip(*found, strict=True)))
    return s, offset


def fit_line(p: Piece, top: int) -> Params:
    """`search_line` rounded to storage; never worse than the line from smallest to largest value."""
    low, high = p.x.amin(-1, True), p.x.amax(-1, True)
    fixed = fixed_moments(p)
    lines = ((high - low) / top, low), search_line(p, top, below_zero=False)
    s, offset = (torch.stack(t) for t in zip(*lines, strict=True))
    found = []
    for _ in range(2):
        s, offset = p.kept(s), p.kept(offset)
        found.append((line_errors(p, s, offset, top), s, offset))
        s, offset, _ = least_squares(stacked_moments(p, fixed, s, offset, top), below_zero=False)
    _, s, offset = pick(*(torch.cat(t) for t in zip(*found, strict=True)))
    return {"d": p.stored(s), "m": p.stored(offset)}
