"""Weights a few thousand units at a time, as the searches for scales take them.

A piece has about 32 thousand weights, so that temporaries stay in the cache and torch does not start threads for them.
Every unit is divided by its largest magnitude, so that no square can overflow or vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fewbits.codecs import native
from fewbits.codecs.base import Params
from fewbits.devices import at_once
from fewbits.lazy import torch

PIECE = (1 << 15) - 1  # torch starts threads from 2^15 elements on
FLOAT16_MAX = 65504.0
LEAST_WEIGHT = 1e-9  # of the largest in the unit: what does not matter still lands near its value
ROUNDING = 1.5 * 2 ** 23  # float32 has no fractions there
TINY = 1e-30
Bound = Any  # a number, or a tensor [starts, units, 1]


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
        """Normalised scales `[..., units, k]` as the file holds them; beyond float16, its largest finite value."""
        s = s * self.peak
        return (s.clamp(-FLOAT16_MAX, FLOAT16_MAX) if self.dtype == torch.float16 else s).to(self.dtype)

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

    def error(self, r: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the squares of `r`, which is overwritten."""
        return self.sum(r.mul_(self.weighted(r)))


def fit_pieces(fit: Callable[[Piece], Params], w: torch.Tensor, importance: torch.Tensor | None, dtype: torch.dtype,
               subs: int = 1, more: Sequence[torch.Tensor] = (), search: native.Search | None = None) -> Params:
    """Call `fit` on pieces of `w` `[..., unit]` and lay its parameters `[units, k]` out as `[..., k]`.

    `search` describes the same fit to the native extension, which does it instead where it can.
    `more` are further tensors `[..., any]` that are cut alike. Units without a single positive importance count evenly.
    """
    found = None if search is None else search.fit(w, importance, dtype)
    if found is not None:
        return found
    lead, width = w.shape[:-1], w.shape[-1]
    if importance is not None:
        importance = importance.expand(w.shape)
    tensors = [w, *([] if importance is None else [importance]), *more]
    cubes = [t.reshape(1, -1, t.shape[-1]) if t.ndim < 3 else t.flatten(0, -3) for t in tensors]
    rows, units = cubes[0].shape[:2]
    across = max(1, at_once(w.device, PIECE) // max(1, width))
    down = max(1, across // max(1, units))
    out: Params = {}
    for top in range(0, rows, down):
        for left in range(0, units, across):
            part = [t[top:top + down, left:left + across] for t in cubes]
            flat = [t.reshape(-1, t.shape[-1]) for t in part]
            weight = None if importance is None else flat[1]
            params = fit(_piece(flat[0], weight, dtype, subs, tuple(flat[len(flat) - len(more):])))
            for k, p in params.items():
                if k not in out:
                    out[k] = torch.empty(rows, units, p.shape[-1], dtype=p.dtype, device=p.device)
                out[k][top:top + down, left:left + across] = p.view(*part[0].shape[:2], -1)
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
    return replace(piece, x=_upright(x.reshape(-1, x.shape[-1] // subs)), weight=weight)


def _upright(x: torch.Tensor) -> torch.Tensor:
    """Narrow units stored column by column: sums over a unit then run along the vector registers."""
    return x.t().contiguous().t() if x.shape[-1] <= 256 else x.contiguous()


def rounded(u: torch.Tensor, low: Bound, high: Bound) -> torch.Tensor:
    """`u` clamped to integers `low` … `high`, and rounded: torch.round would start threads even for small tensors."""
    return u.clamp(low, high).add_(ROUNDING).sub_(ROUNDING)


def invert(s: torch.Tensor) -> torch.Tensor:
    """1/s, and 0 for the zero scale, which decodes everything alike."""
    return torch.where(s == 0, 0.0, 1 / s)


def pick(error: torch.Tensor, *values: torch.Tensor) -> list[torch.Tensor]:
    """The least error along the first dimension, and the values that go with it."""
    index = error.argmin(0, keepdim=True)
    return [t.gather(0, index)[0] for t in (error, *values)]
