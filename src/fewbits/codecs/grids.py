"""The two kinds of grid: evenly spaced levels, and a table of levels."""

from __future__ import annotations

from typing import NamedTuple

from fewbits.codecs.base import Grid
from fewbits.lazy import torch


class UniformGrid:
    """`value = scale * (code - zero) * factor + offset`, codes `low` … `high`.

    `scale`, `zero` and `offset` are `[..., s]`, each entry for `columns / s` columns in a row: s is 1, or the number of
    sub-blocks of a K-quant, or the number of columns.
    """

    def __init__(self, scale: torch.Tensor, high: int, columns: int, *, zero: torch.Tensor | float = 0.0,
                 offset: torch.Tensor | None = None, low: int = 0, factor: float = 1.0):
        self.scale, self.zero, self.offset, self.factor = scale, zero, offset, factor
        self.low, self.high, self.width = low, high, columns

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., s]` to a shape that broadcasts to folded columns."""
        return x.unsqueeze(-1) if self._folds else x

    @property
    def _folds(self) -> bool:
        return 1 < self.scale.shape[-1] < self.width

    def _fold(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.scale.shape[-1], -1)) if self._folds else x

    def encode(self, w: torch.Tensor) -> torch.Tensor:
        scale = self.scale * self.factor
        step = torch.where(scale == 0, torch.inf, scale)  # a zero scale decodes every code alike
        u = self._fold(w.float())
        if self.offset is not None:
            u = u - self._spread(self.offset)
        u = u / self._spread(step)
        u += self._spread(self.zero) if isinstance(self.zero, torch.Tensor) else self.zero
        return u.round_().clamp_(self.low, self.high).to(torch.uint8).reshape(w.shape)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        u = self._fold(codes.float())
        u = u - (self._spread(self.zero) if isinstance(self.zero, torch.Tensor) else self.zero)
        u *= self._spread(self.scale)
        if self.factor != 1.0:
            u *= self.factor
        if self.offset is not None:
            u += self._spread(self.offset)
        return u.reshape(codes.shape)

    def columns(self, index: torch.Tensor | slice) -> Grid:
        subs = self.scale.shape[-1]
        if subs == 1:
            return self
        run = self.width // subs
        which: torch.Tensor | slice
        if isinstance(index, slice):
            start, stop, step = index.indices(self.width)
            if stop - start == step == 1:  # GPTQ asks for one column after the other: no copies then
                which, count = slice(start // run, start // run + 1), 1
            else:
                which = torch.arange(start, stop, step, device=self.scale.device) // run
                count = len(which)
        else:
            which, count = index.to(self.scale.device) // run, len(index)
        zero = self.zero[..., which] if isinstance(self.zero, torch.Tensor) else self.zero
        offset = None if self.offset is None else self.offset[..., which]
        return UniformGrid(self.scale[..., which], self.high, count, zero=zero, offset=offset, low=self.low,
                           factor=self.factor)


class Levels(NamedTuple):
    """A table of levels: by code, and what nearest-level search needs."""

    table: torch.Tensor  # [codes]
    bounds: torch.Tensor  # [codes - 1], midpoints of neighbouring levels
    order: torch.Tensor  # [codes], the code of each level by rank


def levels(table: torch.Tensor) -> Levels:
    ranked, order = torch.sort(table, stable=True)
    order = order[torch.searchsorted(ranked, ranked)]  # of codes with the same level the first is chosen
    return Levels(table, (ranked[1:] + ranked[:-1]) / 2, order)


class TableGrid:
    """`value = table[code] * scale`, scale `[..., 1]`."""

    def __init__(self, scale: torch.Tensor, table: Levels):
        self.scale, self.table = scale, table

    def encode(self, w: torch.Tensor) -> torch.Tensor:
        step = torch.where(self.scale == 0, torch.inf, self.scale)
        rank = torch.bucketize(w.float() / step, self.table.bounds.to(w.device), out_int32=True)
        order = self.table.order.to(w.device, torch.uint8)
        return order.index_select(0, rank.reshape(-1)).reshape(w.shape)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        values = self.table.table.to(codes.device).index_select(0, codes.reshape(-1).int()).reshape(codes.shape)
        return values.mul_(self.scale)

    def columns(self, index: torch.Tensor | slice) -> Grid:
        return self
