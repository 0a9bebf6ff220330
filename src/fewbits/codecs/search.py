"""The search for scales: many starts, each improved by least squares, the best by (weighted) squared error kept.

Everything works on *pieces*: about 32 thousand weights at a time, so that temporaries stay in the cache and torch does not
start threads for them; every unit divided by its largest magnitude, so that no square can overflow or vanish.

For values `s * (q - zero)` with codes q, let r = x/s - (q - zero), the error in steps. With R = sum(r^2), C = sum(r * q),
B = sum(q^2) (all weighted), the best scale for these codes is s * (1 + C/B), and its error s^2 * (R - C^2/B): small numbers
are subtracted from small ones, so float32 does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Callable, Sequence

from fewbits.codecs.base import Params
from fewbits.codecs.grids import Levels
from fewbits.lazy import torch

PIECE = (1 << 15) - 1  # torch starts threads from 2^15 elements on
TINY = 1e-30
FLOAT16_MAX = 65504.0
LEAST_WEIGHT = 1e-9  # of the largest in the unit: what does not matter still lands near its value


def _steps(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(first + (last - first) * i / (count - 1) for i in range(count))


def symmetric_starts(bits: int) -> tuple[float, ...]:
    """Levels on which the largest magnitude may be put, for codes -2^(bits-1) … 2^(bits-1) - 1."""
    middle = 1 << (bits - 1)
    if bits == 8:
        return tuple(-level for level in _steps(121, 128.4, 40)) + _steps(121, 127.4, 24)
    return tuple(-level for level in _steps(0.6 * middle, middle + 0.4, 16)) + _steps(0.6 * middle, middle - 0.6, 12)


ROWWISE_STARTS = _steps(80, 127.4, 24)
SHRINKS = {2: _steps(0.5, 1.1, 13), 3: _steps(0.6, 1.05, 13), 4: _steps(0.7, 1.03, 13), 8: _steps(0.93, 1.0, 13)}
STRETCHES, SHIFTS = _steps(0.72, 1.04, 7), (0.0, 0.33, -0.33)
TABLE_FACTORS = (0.75, 0.85, 0.92, 0.97, 1.0, 1.05)


@dataclass(frozen=True)
class Piece:
    """Some units, flat: `x` `[units * subs, width]` divided by the unit's peak; `weight` alike, or None."""

    x: torch.Tensor
    weight: torch.Tensor | None
    peak: torch.Tensor  # [units, 1], the largest magnitude; 0 for units of zeros
    dtype: torch.dtype  # of stored scales
    subs: int = 1  # sub-blocks a unit
    more: tuple[torch.Tensor, ...] = ()

    @property
    def step(self) -> torch.Tensor:
        """`peak`, but 1 where that is 0."""
        return torch.where(self.peak > 0, self.peak, 1.0)

    def stored(self, s: torch.Tensor) -> torch.Tensor:
        """Normalised scales `[units, k]` as the file holds them. Beyond float16: the largest finite one."""
        return to_storage(s * self.peak, self.dtype)

    def kept(self, s: torch.Tensor) -> torch.Tensor:
        """Normalised scales after rounding to storage."""
        return self.stored(s).float() / self.step

    def unrounded(self) -> Piece:
        """The same weights, without rounding of scales."""
        return replace(self, peak=torch.ones_like(self.peak[:1]), dtype=torch.float32)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`[units * subs, 1]`."""
        return values.sum(-1, keepdim=True)

    def weighted(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.weight is None else values * self.weight


def to_storage(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float16:
        scale = scale.clamp(-FLOAT16_MAX, FLOAT16_MAX)
    return scale.to(dtype)


Fit = Callable[[Piece], Params]


def fit_pieces(fit: Fit, w: torch.Tensor, importance: torch.Tensor | None, dtype: torch.dtype, subs: int = 1,
               more: Sequence[torch.Tensor] = ()) -> Params:
    """Call `fit` on pieces of `w` `[..., unit]` and lay its parameters `[units, k]` out as `[..., k]`.

    `more` are further tensors `[..., any]` that are cut alike. Units without a single positive importance count evenly.
    """
    lead, width = w.shape[:-1], w.shape[-1]
    if importance is not None:
        importance = importance.expand(w.shape)
    tensors = [w, *([] if importance is None else [importance]), *more]
    cube = [t.reshape(1, -1, t.shape[-1]) if t.ndim < 3 else t.flatten(0, -3) for t in tensors]
    rows, units = cube[0].shape[:2]
    take = max(1, PIECE // max(1, width))
    out: Params = {}
    for top in range(0, rows, max(1, take // max(1, units))):
        for left in range(0, units, take):
            part = [t[top:top + max(1, take // max(1, units)), left:left + take] for t in cube]
            flat = [p.reshape(-1, p.shape[-1]) for p in part]
            weight = None if importance is None else flat[1]
            params = fit(_piece(flat[0], weight, dtype, subs, tuple(flat[len(flat) - len(more):])))
            for k, p in params.items():
                if k not in out:
                    out[k] = torch.empty(rows, units, p.shape[-1], dtype=p.dtype, device=p.device)
                out[k][top:top + part[0].shape[0], left:left + take] = p.view(*part[0].shape[:2], -1)
    return {k: p.reshape(*lead, -1) for k, p in out.items()}


def _piece(w: torch.Tensor, importance: torch.Tensor | None, dtype: torch.dtype, subs: int,
           more: tuple[torch.Tensor, ...]) -> Piece:
    x = w.float()
    peak = x.abs().amax(-1, keepdim=True)
    piece = Piece(x, None, peak, dtype, subs, more)
    x, weight = x / piece.step, None
    if importance is not None:
        weight = importance.float()
        most = weight.amax(-1, keepdim=True)
        weight = torch.where(most > 0, weight / torch.where(most > 0, most, 1.0), 1.0).clamp_(min=LEAST_WEIGHT)
        weight = _upright(weight.reshape(-1, weight.shape[-1] // subs))
    return Piece(_upright(x.reshape(-1, x.shape[-1] // subs)), weight, peak, dtype, subs, more)


def _upright(x: torch.Tensor) -> torch.Tensor:
    """Narrow units stored column by column: sums over a unit then run along the vector registers."""
    return x.t().contiguous().t() if x.shape[-1] <= 256 else x.contiguous()


# values s * q, low <= q <= high ---------------------------------------------------------------------------------------
Bound = Any  # a number, or a tensor [units, 1]


def invert(s: torch.Tensor) -> torch.Tensor:
    """1/s, and 0 for the zero scale, which decodes everything to zero."""
    return torch.where(s == 0, 0.0, 1 / s)


def energy(p: Piece) -> torch.Tensor:
    return p.sum(p.weighted(p.x * p.x))


def probe(p: Piece, s: torch.Tensor, low: Bound, high: Bound,
          total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Error with the nearest codes at scale `s`; the best scale for those codes, and its error."""
    inverse = invert(s)
    r = p.x * inverse
    q = torch.round(r).clamp_(low, high)
    r -= q
    v = p.weighted(r)
    c, e = p.sum(q.mul_(v)), p.sum(r.mul_(v))
    b = (inverse * inverse * total - 2 * c - e).clamp_(min=TINY)
    s2 = s * s
    error = torch.where(s == 0, total, e * s2)
    return error, s * (1 + c / b), torch.where(s == 0, total, (e - c * c / b) * s2)


def search_scale(p: Piece, low: Bound, high: Bound, starts: Sequence[float], plain: float,
                 rounds: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale `[units, 1]`, normalised and rounded to storage, and its error.

    `starts` are levels on which the element of largest magnitude is put; their signs differ where `low` and `high` do.
    `plain` is the level that a quantizer without search takes: the result is never worse than that.
    """
    total = energy(p)
    extreme = p.x.gather(-1, p.x.abs().argmax(-1, keepdim=True))
    extreme = torch.where(extreme == 0, 1.0, extreme)
    least, best = torch.full_like(total, torch.inf), torch.zeros_like(total)
    for level in starts:
        _, s, error = probe(p, extreme / level, low, high, total)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, s, best)
    return polish(p, low, high, (extreme / plain, best), total, rounds)


def polish(p: Piece, low: Bound, high: Bound, starts: Sequence[torch.Tensor], total: torch.Tensor,
           rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of `starts` and of what repeated least squares makes of each, as stored."""
    least, best = torch.full_like(total, torch.inf), torch.zeros_like(total)
    for s in starts:
        for _ in range(rounds):
            s = p.kept(s)
            error, improved, _ = probe(p, s, low, high, total)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, s, best)
            s = improved
    return best, least


# values s * (q - zero), zero an integer -------------------------------------------------------------------------------
def search_zero(p: Piece, top: int, shrinks: Sequence[float], shifts: Sequence[int],
                rounds: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale, as stored, and zero point 0 … `top` for codes 0 … `top`. `shrinks` are parts of the range that is covered.

    Shrink 1 and shift 0, the plain choice, is among the candidates: the result is never worse than that.
    """
    total = energy(p)
    low, high = p.x.amin(-1, True).clamp(max=0), p.x.amax(-1, True).clamp(min=0)
    plain = (high - low) / top
    plain = torch.where(plain > 0, plain, 1.0)
    plain_zero = torch.round(-low / plain).clamp(0, top)
    least = torch.full_like(total, torch.inf)
    best, zero = plain, plain_zero
    for shrink in shrinks:
        s = plain * shrink
        for shift in shifts:
            z = (torch.round((top - (high + low) / s) / 2) + shift).clamp_(0, top)
            _, improved, error = probe(p, s, -z, top - z, total)
            better = error < least
            least = torch.where(better, error, least)
            best, zero = torch.where(better, improved, best), torch.where(better, z, zero)
    found, error = polish(p, -zero, top - zero, (best,), total, rounds)
    start, plain_error = polish(p, -plain_zero, top - plain_zero, (plain,), total, rounds)
    worse = plain_error < error
    return torch.where(worse, start, found), torch.where(worse, plain_zero, zero)


# values s * q + offset, 0 <= q <= top ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Line:
    """`s * q + offset` for each unit, and its error."""

    s: torch.Tensor
    offset: torch.Tensor
    error: torch.Tensor

    def or_better(self, other: Line) -> Line:
        better = other.error < self.error
        return Line(*(torch.where(better, b, a) for a, b in
                      ((self.s, other.s), (self.offset, other.offset), (self.error, other.error))))


class Moments:
    """Sums over each unit that don't depend on codes."""

    def __init__(self, p: Piece):
        v = p.weighted(p.x)
        self.w = p.sum(p.weight) if p.weight is not None else torch.full_like(v[:, :1], v.shape[-1])
        self.x, self.xx = p.sum(v), p.sum(v * p.x)


def codes_on(p: Piece, s: torch.Tensor, offset: torch.Tensor, top: int) -> torch.Tensor:
    """Nearest codes, as float32."""
    q = (p.x - offset).mul_(invert(s))
    return q.round_().clamp_(0, top)


def line_error(p: Piece, s: torch.Tensor, offset: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    r = (q * s).add_(offset).sub_(p.x)
    return p.sum(r.mul_(r if p.weight is None else r * p.weight))


def least_squares(p: Piece, q: torch.Tensor, m: Moments, below_zero: bool) -> Line:
    """The best line for codes `q`; with `below_zero` its offset is at most 0."""
    v = p.weighted(q)
    a, b, c = p.sum(v), p.sum(v * q), p.sum(v.mul_(p.x))
    det = m.w * b - a * a
    ok = det > 1e-6 * m.w * b
    det = torch.where(ok, det, 1.0)
    s, offset = (m.w * c - a * m.x) / det, (b * m.x - a * c) / det
    alone = (offset > 0) | ~ok if below_zero else ~ok
    s = torch.where(alone, c / b.clamp(min=TINY), s)
    offset = torch.where(alone, 0.0, offset)
    return Line(s, offset, m.xx - s * c - offset * m.x)


def search_line(p: Piece, top: int, stretches: Sequence[float], shifts: Sequence[float], below_zero: bool,
                rounds: int = 2) -> Line:
    """Scale and offset, not yet rounded to storage, by least squares from several starts.

    A start covers `stretches` times the range of a unit, its middle shifted by `shifts` of a step.
    """
    m = Moments(p)
    low, high = p.x.amin(-1, True), p.x.amax(-1, True)
    if below_zero:
        low = low.clamp(max=0)
        high = torch.maximum(high, low)
    best = Line(torch.zeros_like(low), low, torch.full_like(low, torch.inf))
    for stretch in stretches:
        for shift in shifts:
            s = (high - low) * (stretch / top)
            offset = (high + low) / 2 - s * (top / 2 + shift)
            if below_zero:
                offset = offset.clamp_(max=0)
            for _ in range(rounds):
                line = least_squares(p, codes_on(p, s, offset, top), m, below_zero)
                best = best.or_better(line)
                s, offset = line.s, line.offset
    return best


def fit_line(p: Piece, top: int) -> Line:
    """`search_line`, rounded to storage; never worse than the line from smallest to largest value."""
    low, high = p.x.amin(-1, True), p.x.amax(-1, True)
    found = search_line(p, top, STRETCHES, SHIFTS, below_zero=False)
    m, best = Moments(p), Line(low, low, torch.full_like(low, torch.inf))
    for line in (Line((high - low) / top, low, low), found):
        for _ in range(2):
            s, offset = p.kept(line.s), p.kept(line.offset)
            q = codes_on(p, s, offset, top)
            best = best.or_better(Line(s, offset, line_error(p, s, offset, q)))
            line = least_squares(p, q, m, below_zero=False)
    return best


# values s * table[code] -----------------------------------------------------------------------------------------------
def nearest(u: torch.Tensor, table: Levels) -> torch.Tensor:
    """The level nearest to each of `u`."""
    ranked = table.table[table.order]
    base = u.t() if u.stride(0) == 1 else u  # contiguous either way
    found = ranked.index_select(0, torch.bucketize(base, table.bounds, out_int32=True).reshape(-1)).view(base.shape)
    return found.t() if u.stride(0) == 1 else found


def table_error(p: Piece, s: torch.Tensor, table: Levels) -> torch.Tensor:
    r = nearest(p.x * invert(s), table).mul_(s).sub_(p.x)
    return p.sum(r.mul_(r if p.weight is None else r * p.weight))


def search_table(p: Piece, table: Levels, signed: bool, rounds: int = 2) -> torch.Tensor:
    """Scale `[units, 1]`, normalised; negative ones too where `signed`. Never worse than the largest magnitude."""
    least, best = table_error(p, torch.ones_like(p.sum(p.x)), table), torch.ones_like(p.sum(p.x))
    for factor in TABLE_FACTORS:
        for s in (best.new_full(best.shape, f) for f in ((factor, -factor) if signed else (factor,))):
            for _ in range(rounds):
                t = nearest(p.x * invert(s), table)
                r = (t * s).sub_(p.x)
                error = p.sum(r.mul_(r if p.weight is None else r * p.weight))
                better = error < least
                least, best = torch.where(better, error, least), torch.where(better, s, best)
                v = p.weighted(t)
                s = p.sum(v * p.x) / p.sum(v.mul_(t)).clamp_(min=TINY)
    return best


# parameters for codes that are given ----------------------------------------------------------------------------------
def refit_scale(w: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None,
                importance: torch.Tensor | None, middle: int = 0) -> Params:
    """The least-squares scale for given codes, where it beats the present one."""

    def fit(p: Piece) -> Params:
        old, q = p.more[0].float() / p.step, p.more[1].float()
        q = q - (p.more[2].float() if zero is not None else middle)
        v = p.weighted(q)
        new = p.kept(p.sum(v * p.x) / p.sum(v.mul_(q)).clamp_(min=TINY))
        none = torch.zeros_like(old)
        better = line_error(p, new, none, q) < line_error(p, old, none, q)
        return {"scale": torch.where(better, p.stored(new), p.more[0])}

    more = [scale, codes] + ([] if zero is None else [zero])
    return fit_pieces(fit, w, importance, scale.dtype, more=more)


def refit_line(w: torch.Tensor, codes: torch.Tensor, d: torch.Tensor, m: torch.Tensor,
               importance: torch.Tensor | None) -> Params:
    """The least-squares scale and minimum for given codes, where they beat the present ones."""

    def fit(p: Piece) -> Params:
        old, offset, q = p.more[0].float() / p.step, p.more[1].float() / p.step, p.more[2].float()
        line = least_squares(p, q, Moments(p), below_zero=False)
        better = line_error(p, p.kept(line.s), p.kept(line.offset), q) < line_error(p, old, offset, q)
        return {"d": torch.where(better, p.stored(line.s), p.more[0]),
                "m": torch.where(better, p.stored(line.offset), p.more[1])}

    return fit_pieces(fit, w, importance, d.dtype, more=[d, m, codes])
