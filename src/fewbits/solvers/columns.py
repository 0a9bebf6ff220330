"""Columns of one unit rounded one after the other, each after what the errors of those before it ask of it."""

from __future__ import annotations

from fewbits import _native
from fewbits.codecs.base import Grid
from fewbits.instructions import threads
from fewbits.lazy import torch

BLOCK = 32  # columns whose errors reach those after the block together: so few that their part of `mix` stays in cache


def sweep(x: torch.Tensor, grid: Grid, mix: torch.Tensor, position: torch.Tensor,
          old: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the columns `x` `[unit, rows]` and their errors: x - value, or with `old`, value - old.

    Column i is rounded after it fell by `mix[j, i]` `[unit, unit]` times the error of every column j before it;
    `position` `[unit]` is where the grid has each column.
    """
    how = grid.rounding()
    if how is None or x.device.type != "cpu" or x.dtype != torch.float32:
        return by_rounders(x, grid, mix, position, old)
    values, errors = torch.empty_like(x), torch.empty_like(x)
    _native.sweep(x=x.contiguous(), old=None if old is None else old.contiguous(), mix=mix.contiguous(),
                  position=position, **how._asdict(), values=values, errors=errors, threads=threads())
    return values, errors


def by_rounders(x: torch.Tensor, grid: Grid, mix: torch.Tensor, position: torch.Tensor,
                old: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, column by column in torch: for grids that are code, other devices and float64; `sweep` is tested
    against it."""
    rounders, places, work = grid.rounders(len(x)), position.tolist(), x.clone()
    values: list[torch.Tensor] = []
    errors: list[torch.Tensor] = []
    for start in range(0, len(x), BLOCK):
        stop = min(start + BLOCK, len(x))
        columns, shares = work[start:stop].unbind(), mix[start:stop, start:stop].contiguous().unbind()
        for j in range(stop - start):
            values.append(rounders[places[start + j]](columns[j]))
            errors.append(columns[j] - values[-1] if old is None else values[-1] - old[start + j])
            work[start + j + 1:stop].addr_(shares[j][j + 1:], errors[-1], alpha=-1)
        work[stop:].addmm_(mix[start:stop, stop:].T, torch.stack(errors[start:]), alpha=-1)
    return torch.stack(values), torch.stack(errors)
