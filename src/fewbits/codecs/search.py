"""The search for scales: many starts, each improved by least squares, the best by (weighted) squared error kept.

For values `s * q` with codes q let r = x/s - q, the error in steps. With R = sum(r^2), C = sum(r * q) and B = sum(q^2)
(all weighted), the best scale for these codes is s * (1 + C/B), and its error s^2 * (R - C^2/B): small numbers are
subtracted from small ones, so float32 does. Starts are stacked: `[starts, units, 1]`.
"""

from __future__ import annotations

from collections.abc import Sequence

from fewbits.codecs import native
from fewbits.codecs.base import Params
from fewbits.codecs.grids import Levels
from fewbits.codecs.lines import least_squares, moments
from fewbits.codecs.native import ratios
from fewbits.codecs.pieces import PIECE, TINY, Bound, Piece, fit_pieces, invert, pick, rounded
from fewbits.devices import at_once
from fewbits.lazy import torch

# Where scales are looked for, by bits: the plain scale over these. With importances also far smaller scales, since the
# largest magnitude may not matter. Chosen on weights of SmolLM2; more starts gain less than a per cent. From 5 bits on
# those of the native search.
SPREADS = native.SPREADS | {2: ratios(0.6, 1.6, 16), 3: ratios(0.6, 1.6, 16), 4: ratios(0.6, 1.4, 16)}
WEIGHTED_SPREADS = native.WEIGHTED_SPREADS | {2: ratios(0.6, 2.2, 16), 3: ratios(0.6, 2.2, 16),
                                              4: ratios(0.6, 2.1, 16)}
ROWWISE_STARTS = tuple(127 * part for part in ratios(0.8, 1.3, 24) + ratios(0.96, 1.01, 12))
SHRINKS = {2: ratios(0.5, 1.1, 13), 3: ratios(0.55, 1.05, 13), 4: ratios(0.6, 1.03, 13), 8: ratios(0.93, 1.0, 13)}
IQ4_STARTS = tuple(sign * level for sign in (-1, 1) for level in ratios(90, 190, 14))
WEIGHTED_IQ4_STARTS = tuple(sign * level for sign in (-1, 1) for level in ratios(90, 290, 16))
TABLE_FACTORS = (0.75, 0.85, 0.92, 0.97, 1.0, 1.05)
WEIGHTED_TABLE_FACTORS = (0.45, 0.6, 0.72, 0.82, 0.9, 0.96, 1.02, 1.1)


def symmetric_starts(p: Piece, bits: int) -> tuple[float, ...]:
    """Levels on which the largest magnitude is put, for codes -2^(bits-1) … 2^(bits-1) - 1."""
    spreads = (SPREADS if p.weight is None else WEIGHTED_SPREADS)[bits]
    return tuple(sign * part * (1 << (bits - 1)) for sign in (-1, 1) for part in spreads)


# values s * q, low <= q <= high ---------------------------------------------------------------------------------------
def energy(p: Piece) -> torch.Tensor:
    return p.sum(p.weighted(p.x * p.x))


def extremes(p: Piece) -> torch.Tensor:
    """The element of largest magnitude; 1 where all are zero."""
    found = p.x.gather(-1, p.x.abs().argmax(-1, keepdim=True))
    return torch.where(found == 0, 1.0, found)


def probe(p: Piece, s: torch.Tensor, low: Bound, high: Bound,
          total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Error with the nearest codes at each scale `s`; the best scale for those codes, and its error."""
    inverse, sums = invert(s), []
    for i in range(len(s)):
        r = p.x * inverse[i]
        q = rounded(r, *(b[i] if isinstance(b, torch.Tensor) else b for b in (low, high)))
        r -= q
        v = p.weighted(r)
        sums.append((p.sum(q.mul_(v)), p.sum(r.mul_(v))))
    c, e = (torch.stack(t) for t in zip(*sums, strict=True))
    b = (inverse * inverse * total - 2 * c - e).clamp_(min=TINY)
    s2 = s * s
    zero = s == 0
    return torch.where(zero, total, e * s2), s * (1 + c / b), torch.where(zero, total, (e - c * c / b) * s2)


def search_scale(p: Piece, low: float, high: float, starts: Sequence[float], plain: float) -> torch.Tensor:
    """Scale `[units, 1]`, normalised and rounded to storage.

    `starts` are levels on which the element of largest magnitude is put; their signs differ where `low` and `high` do.
    `plain` is the level that a quantizer without search takes: the result is never worse than that.
    """
    total, extreme = energy(p), extremes(p)
    found = [extreme / plain]
    batch = max(1, at_once(p.x.device, PIECE) // len(p.x))
    for at in range(0, len(starts), batch):
        levels = extreme.new_tensor(starts[at:at + batch]).view(-1, 1, 1)
        _, s, error = probe(p, extreme / levels, low, high, total)
        found.append(pick(error, s)[1])
    return polish(p, low, high, torch.stack(found), total)[0]


def polish(p: Piece, low: Bound, high: Bound, s: torch.Tensor, total: torch.Tensor,
           rounds: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """The best, as stored, of the scales `s` and of what repeated least squares makes of each; and its error."""
    tries, errors = [], []
    for _ in range(rounds):
        s = p.kept(s)
        error, improved, _ = probe(p, s, low, high, total)
        tries.append(s)
        errors.append(error)
        s = improved
    error, best = pick(torch.cat(errors), torch.cat(tries))
    return best, error


# values s * (q - zero), zero an integer -------------------------------------------------------------------------------
def search_zero(p: Piece, top: int, shrinks: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale, as stored, and zero point 0 … `top` for codes 0 … `top`. `shrinks` are parts of the range that is covered.

    Never worse than covering exactly the range from the smallest to the largest value (zero included).
    """
    total = energy(p)
    low, high = p.x.amin(-1, True).clamp_(max=0), p.x.amax(-1, True).clamp_(min=0)
    plain = (high - low) / top
    plain = torch.where(plain > 0, plain, 1.0)
    found = [(plain, rounded(-low / plain, 0, top))]
    shift = plain.new_tensor((0.0, -1.0, 1.0)).view(-1, 1, 1)
    for shrink in shrinks:
        s = plain * shrink
        zero = (rounded((top - (high + low) / s) / 2, 0, top) + shift).clamp_(0, top)
        _, improved, error = probe(p, s.expand(zero.shape), -zero, top - zero, total)
        found.append(tuple(pick(error, improved, zero)))  # type: ignore[arg-type]
    _, s, zero = pick(*(torch.stack(t) for t in zip(*found[1:], strict=True)))
    s, zero = torch.stack([plain, s]), torch.stack([found[0][1], zero])
    tries = [polish(p, -zero[i:i + 1], top - zero[i:i + 1], s[i:i + 1], total) for i in range(2)]
    best = pick(torch.stack([t[1] for t in tries]), torch.stack([t[0] for t in tries]), zero)
    return best[1], best[2]


# values s * table[code] -----------------------------------------------------------------------------------------------
def nearest(u: torch.Tensor, table: Levels) -> torch.Tensor:
    """The level nearest to each of `u`, to float32 rounding.

    Levels that are integers are looked up by halves; else a sum of steps is faster here than a binary search.
    """
    if table.halves is not None:
        reach = len(table.halves) // 2
        at = (u * 2).nan_to_num_(0.0).clamp_(-reach, reach - 1).floor_().add_(reach).int()
        flat = at if at.is_contiguous() else at.t()  # as it lies in memory
        found = table.halves.to(u.device).index_select(0, flat.reshape(-1)).view(flat.shape)
        return found if at.is_contiguous() else found.t()
    ranked = table.table[table.order].tolist()
    found, passed = torch.full_like(u, ranked[0]), torch.empty_like(u)
    for bound, low, high in zip(table.bounds.tolist(), ranked, ranked[1:], strict=False):
        if high > low:
            found.add_(torch.gt(u, bound, out=passed), alpha=high - low)
    return found


def table_error(p: Piece, s: torch.Tensor, table: Levels) -> torch.Tensor:
    return p.error(nearest(p.x * invert(s), table).mul_(s).sub_(p.x))


def search_table(p: Piece, table: Levels, signed: bool, rounds: int = 2) -> torch.Tensor:
    """Scale `[units, 1]`, normalised; negative ones too where `signed`. Never worse than the largest magnitude."""
    one = torch.ones(len(p.x), 1, device=p.x.device)
    tries, errors = [one], [table_error(p, one, table)]
    factors = TABLE_FACTORS if p.weight is None else WEIGHTED_TABLE_FACTORS
    for factor in factors + (tuple(-f for f in factors) if signed else ()):
        s = one * factor
        for _ in range(rounds):
            t = nearest(p.x * invert(s), table)
            tries.append(s)
            errors.append(p.error((t * s).sub_(p.x)))
            v = p.weighted(t)
            s = p.sum(v * p.x) / p.sum(v * t).clamp_(min=TINY)
    return pick(torch.stack(errors), torch.stack(tries))[1]


def search_levels(p: Piece, table: Levels, starts: Sequence[float], rounds: int = 3) -> torch.Tensor:
    """Scale `[units, 1]`, normalised and rounded to storage; `starts` are levels for the largest magnitude.

    Never worse than that on the first level.
    """
    total, extreme = energy(p), extremes(p)
    found = extreme / table.table[0]
    least, best = torch.full_like(total, torch.inf), found
    for level in starts:
        s, error = improve(p, nearest(p.x * invert(extreme / level), table), total)
        least, best = torch.where(error < least, error, least), torch.where(error < least, s, best)
    tries, errors = [], []
    for s in (found, best):
        for _ in range(rounds):
            s = p.kept(s)
            t = nearest(p.x * invert(s), table)
            tries.append(s)
            errors.append(p.error((t * s).sub_(p.x)))
            s = improve(p, t, total)[0]
    return pick(torch.stack(errors), torch.stack(tries))[1]


def improve(p: Piece, t: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scale for given levels `t`, and its error to some 1e-6 of `total`."""
    v = p.weighted(t)
    tx, tt = p.sum(v * p.x), p.sum(v * t).clamp_(min=TINY)
    s = tx / tt
    return s, total - s * tx


# parameters for codes that are given ----------------------------------------------------------------------------------
def refit_scale(w: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | float,
                importance: torch.Tensor | None) -> torch.Tensor:
    """The least-squares scale for given codes, where it beats the present one."""

    def fit(p: Piece) -> Params:
        old, q = p.more[0].float() / p.step, p.more[1].float()
        q = q - (p.more[2].float() if isinstance(zero, torch.Tensor) else zero)
        v = p.weighted(q)
        new = p.kept(p.sum(v * p.x) / p.sum(v * q).clamp_(min=TINY))
        better = p.error(q * new - p.x) < p.error(q * old - p.x)
        return {"scale": torch.where(better, p.stored(new), p.more[0])}

    more = [scale, codes] + ([zero] if isinstance(zero, torch.Tensor) else [])
    return fit_pieces(fit, w, importance, scale.dtype, more=more)["scale"]


def refit_line(w: torch.Tensor, codes: torch.Tensor, d: torch.Tensor, m: torch.Tensor,
               importance: torch.Tensor | None) -> Params:
    """The least-squares scale and minimum for given codes, where they beat the present ones."""

    def fit(p: Piece) -> Params:
        old, offset, q = p.more[0].float() / p.step, p.more[1].float() / p.step, p.more[2].float()
        s, o, _ = least_squares(moments(p, q), below_zero=False)
        better = p.error(q * p.kept(s) + p.kept(o) - p.x) < p.error(q * old + offset - p.x)
        return {"d": torch.where(better, p.stored(s), p.more[0]), "m": torch.where(better, p.stored(o), p.more[1])}

    return fit_pieces(fit, w, importance, d.dtype, more=[d, m, codes])
