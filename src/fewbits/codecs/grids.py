"""The two kinds of grid: evenly spaced levels, and a table of levels."""

from __future__ import annotations

from typing import NamedTuple

from fewbits.codecs import native
from fewbits.codecs.base import Grid, Rounder, Rounding
from fewbits.lazy import torch


class _Folded(Grid):
    """Scales `[..., s]`, each for `width / s` columns in a row: s is 1, or the number of sub-blocks, or of columns."""

    def __init__(self, scale: torch.Tensor, width: int):
        self.scale, self.width = scale, width

    @property
    def _folds(self) -> bool:
        return 1 < self.scale.shape[-1] < self.width

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., s]` to a shape that broadcasts to folded columns."""
        return x.unsqueeze(-1) if self._folds else x

    def _fold(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.scale.shape[-1], -1)) if self._folds else x

    def _which(self, index: torch.Tensor | slice) -> tuple[torch.Tensor | slice, int]:
        """The scales of some columns, and how many columns they are."""
        run = self.width // self.scale.shape[-1]
        if not isinstance(index, slice):
            return index.to(self.scale.device) // run, len(index)
        start, stop, step = index.indices(self.width)
        if stop - start == step == 1:  # GPTQ asks for one column after the other: no copies then
            return slice(start // run, start // run + 1), 1
        which = torch.arange(start, stop, step, device=self.scale.device) // run
        return which, len(which)

    def rounders(self, width: int) -> list[Rounder]:
        how = self.rounding()
        found = [_rounder(how, i) for i in range(len(how.scale))]
        return [r for r in found for _ in range(width // len(found))]

    def rounding(self) -> Rounding:
        raise NotImplementedError


def _rounder(how: Rounding, group: int) -> Rounder:
    scale, inverse = how.scale[group], how.inverse[group]

    def nearest_code(w: torch.Tensor) -> torch.Tensor:
        codes = torch.addcmul(shift, w.float(), inverse).round_().clamp_(how.low, how.high)
        return torch.addcmul(base, codes, scale)

    def nearest_level(w: torch.Tensor) -> torch.Tensor:
        return table.index_select(0, torch.bucketize(w.float() * inverse, bounds, out_int32=True)).mul_(scale)

    if how.table is not None and how.bounds is not None:
        table, bounds = how.table, how.bounds
        return nearest_level
    assert how.shift is not None and how.base is not None
    shift, base = how.shift[group], how.base[group]
    return nearest_code


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """0 for the zero scale, which decodes every code alike."""
    return (1 / scale).nan_to_num_(0.0, 0.0, 0.0)


class UniformGrid(_Folded):
    """`value = scale * (code - zero) * factor + offset`, codes `low` … `high`.

    `scale`, `zero` and `offset` are `[..., s]`, each entry for `columns / s` columns in a row: s is 1, or the number of
    sub-blocks of a K-quant, or the number of columns.
    """

    def __init__(self, scale: torch.Tensor, high: int, columns: int, *, zero: torch.Tensor | float = 0.0,
                 offset: torch.Tensor | None = None, low: int = 0, factor: float = 1.0):
        super().__init__(scale, columns)
        self.zero, self.offset, self.factor = zero, offset, factor
        self.low, self.high = low, high

    def encode(self, w: torch.Tensor) -> torch.Tensor:
        scale = self.scale * self.factor
        found = native.codes(w, self._shared, self.low, self.high)
        if found is not None:
            return found
        step = torch.where(scale == 0, torch.inf, scale)  # a zero scale decodes every code alike
        u = self._fold(w.float())
        if self.offset is not None:
            u = u - self._spread(self.offset)
        u = u / self._spread(step)
        u += self._spread(self.zero) if isinstance(self.zero, torch.Tensor) else self.zero
        return u.round_().clamp_(self.low, self.high).to(torch.uint8).reshape(w.shape)

    @property
    def _shared(self) -> native.Shared:
        return native.Shared(self.scale, self.offset, self.zero, self.factor)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        found = native.values(codes, self._shared)
        if found is not None:
            return found
        u = self._fold(codes.float())
        u = u - (self._spread(self.zero) if isinstance(self.zero, torch.Tensor) else self.zero)
        u *= self._spread(self.scale)
        if self.factor != 1.0:
            u *= self.factor
        if self.offset is not None:
            u += self._spread(self.offset)
        return u.reshape(codes.shape)

    def columns(self, index: torch.Tensor | slice) -> Grid:
        if self.scale.shape[-1] == 1:
            return self
        which, count = self._which(index)
        zero = self.zero[..., which] if isinstance(self.zero, torch.Tensor) else self.zero
        offset = None if self.offset is None else self.offset[..., which]
        return UniformGrid(self.scale[..., which], self.high, count, zero=zero, offset=offset, low=self.low,
                           factor=self.factor)

    def rounding(self) -> Rounding:
        scale = self.scale * self.factor
        inverse = _inverse(scale)
        offset = torch.zeros_like(scale) if self.offset is None else self.offset
        scales = (scale, inverse, self.zero - offset * inverse, offset - self.zero * scale)
        scale, inverse, shift, base = (x.T.contiguous() for x in scales)
        return Rounding(scale, inverse, shift, base, self.low, self.high)


class Levels(NamedTuple):
    """A table of levels: by code, and what nearest-level search needs."""

    table: torch.Tensor  # [codes]
    bounds: torch.Tensor  # [codes - 1], midpoints of neighbouring levels
    order: torch.Tensor  # [codes], the code of each level by rank
    halves: torch.Tensor | None = None  # for integer levels: the nearest to numbers from i/2 to (i+1)/2, around i = 0


def levels(table: torch.Tensor) -> Levels:
    ranked, order = torch.sort(table, stable=True)
    order = order[torch.searchsorted(ranked, ranked)]  # of codes with the same level the first is chosen
    bounds = (ranked[1:] + ranked[:-1]) / 2
    return Levels(table, bounds, order, _halves(ranked, bounds))


def _halves(ranked: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor | None:
    """Between integers all bounds are multiples of a half."""
    if not torch.equal(ranked, ranked.round().clamp(-128, 128)):
        return None
    reach = 2 * max(1, int(ranked.abs().max()))
    return ranked[torch.bucketize(torch.arange(-reach, reach) / 2, bounds, right=True)]


class TableGrid(_Folded):
    """`value = table[code] * scale`, scale `[..., s]`, each entry for `columns / s` columns in a row."""

    def __init__(self, scale: torch.Tensor, table: Levels, columns: int):
        super().__init__(scale, columns)
        self.table = table

    def encode(self, w: torch.Tensor) -> torch.Tensor:
        found = native.codes(w, native.Shared(self.scale, table=self.table), 0, len(self.table.table) - 1)
        if found is not None:
            return found
        step = torch.where(self.scale == 0, torch.inf, self.scale)
        u = self._fold(w.float()) / self._spread(step)
        rank = torch.bucketize(u.contiguous(), self.table.bounds.to(w.device), out_int32=True)
        order = self.table.order.to(w.device, torch.uint8)
        return order.index_select(0, rank.reshape(-1)).reshape(w.shape)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        found = native.values(codes, native.Shared(self.scale, table=self.table))
        if found is not None:
            return found
        values = self.table.table.to(codes.device).index_select(0, codes.reshape(-1).int()).reshape(codes.shape)
        return self._fold(values).mul_(self._spread(self.scale)).reshape(codes.shape)

    def columns(self, index: torch.Tensor | slice) -> Grid:
        if self.scale.shape[-1] == 1:
            return self
        which, count = self._which(index)
        return TableGrid(self.scale[..., which], self.table, count)

    def rounding(self) -> Rounding:
        device = self.scale.device
        return Rounding(self.scale.T.contiguous(), _inverse(self.scale).T.contiguous(),
                        table=self.table.table.sort().values.to(device), bounds=self.table.bounds.to(device))
