"""GPTQ (Frantar et al., 2022) for any codec: round a column, spread its error over the columns still to come.

Order of columns: units by their summed importance, columns by importance inside a unit. Every unit is fitted when the
loop arrives at it, on weights that already carry the corrections of the columns before; a weight counts as much as its
error will cost once the columns after it have corrected it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from fewbits.codecs.base import Codec, Grid, Params, Shape
from fewbits.lazy import torch
from fewbits.solvers.curvature import Curvature
from fewbits.solvers.descent import BLOCK, descend, refit

ROWS = 4096  # of the weight that a worker solves at a time: with fewer, threads wait for Python more than they compute
SWEEPS = 3  # of coordinate descent afterwards


def refuses(codec: Codec, shape: Shape) -> str | None:
    if codec.matrix(shape) != (math.prod(shape[:-1]), shape[-1]):
        return f"blocks of {codec.name} cross rows at width {shape[-1]}, so columns cannot be rounded one by one"
    return None


def gptq(w: torch.Tensor, codec: Codec, bent: Curvature, state: Params | None = None, *, again: bool = True,
         sweeps: int = SWEEPS) -> tuple[torch.Tensor, Params]:
    """Codes `[rows, columns]` and params of `w`, minimising tr((W - Q) H (W - Q)^T) column by column.

    With `again` each unit's float parameters are fitted to its codes and the unit is rounded once more; `sweeps` of
    coordinate descent follow.
    """

    def some(rows: slice) -> tuple[torch.Tensor, Params]:
        known = None if state is None else {k: s[rows] for k, s in state.items()}
        codes, params = _rows(w[rows], codec, bent, known, again)
        return descend(w[rows], codec, codes, params, bent.moment, sweeps) if sweeps else (codes, params)

    # rows don't see each other: the same parts on every machine, shared by the cores
    cuts = [slice(at, at + ROWS) for at in range(0, len(w), ROWS)]
    with alone() as threads, ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(some, cuts) if len(cuts) > 1 else map(some, cuts))
    return torch.cat([c for c, _ in parts]), {k: torch.cat([p[k] for _, p in parts]) for k in parts[0][1]}


@contextmanager
def alone() -> Iterator[int]:
    """Keep torch from starting threads of its own for small operations; how many it would have started."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _rows(w: torch.Tensor, codec: Codec, bent: Curvature, state: Params | None,
          again: bool) -> tuple[torch.Tensor, Params]:
    """Some rows of the weight, all columns."""
    columns = w.shape[1]
    work = w.T[torch.cat(bent.order)].contiguous()  # [columns, rows]: a column lies in one piece
    codes = torch.empty(w.shape[::-1], dtype=torch.uint8)
    fitted: dict[int, Params] = {}
    at = 0
    for unit, local in zip(bent.order, bent.units, strict=True):
        cut = slice(at, at + len(unit))
        natural, place = unit.sort()  # the unit's columns as the file orders them, and where the loop keeps them
        first = int(natural[0]) // codec.unit(columns)
        position = place.argsort().tolist()
        known = None if state is None else {k: s[:, first] for k, s in state.items()}
        x, own = work[cut], bent.upper[cut, cut]
        wanted = x[place]
        params = codec.fit(wanted.T, bent.importance[natural], known)
        values, errors = _round(x, codec.grid(params, len(unit)), position, own)
        if again:
            found = codec.grid(params, len(unit)).encode(values[place].T.contiguous())
            pull = local @ (wanted - values[place])
            better, _ = refit(codec, found, params, values[place], pull, local)
            if better is not params:
                others, wrong = _round(x, codec.grid(better, len(unit)), position, own)
                falls = wrong.square().sum(0) < errors.square().sum(0)
                values, errors = torch.where(falls, others, values), torch.where(falls, wrong, errors)
                params = {k: torch.where(falls[:, None], better[k], p) for k, p in params.items()}
        codes[natural] = codec.grid(params, len(unit)).encode(values[place].T.contiguous()).T
        work[cut.stop:] -= bent.upper[cut, cut.stop:].T @ errors
        fitted[first] = params
        at = cut.stop
    units = [fitted[k] for k in sorted(fitted)]
    return codes.T.contiguous(), {k: torch.stack([u[k] for u in units], dim=1) for k in units[0]}


def _round(x: torch.Tensor, grid: Grid, position: list[int], upper: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the columns `x` `[unit, rows]`, each rounded after those before it, and the errors they pass on, in
    units that make the sum of their squares the loss."""
    rounders, work, size = grid.rounders(len(x)), x.clone(), upper.diagonal()
    share = upper / size[:, None]  # of an error that later columns take over
    values: list[torch.Tensor] = []
    errors: list[torch.Tensor] = []
    for start in range(0, len(x), BLOCK):
        stop = min(start + BLOCK, len(x))
        columns, shares = work[start:stop].unbind(), share[start:stop, start:stop].unbind()
        for j in range(stop - start):
            values.append(rounders[position[start + j]](columns[j]))
            errors.append(columns[j] - values[-1])
            work[start + j + 1:stop].addr_(shares[j][j + 1:], errors[-1], alpha=-1)
        work[stop:].addmm_(share[start:stop, stop:].T, torch.stack(errors[start:]), alpha=-1)
    return torch.stack(values), torch.stack(errors) / size[:, None]
