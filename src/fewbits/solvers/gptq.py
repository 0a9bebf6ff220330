"""GPTQ (Frantar et al., 2022) for any codec: round a column, spread its error over the columns still to come.

Order of columns: units by their summed importance, columns by importance inside a unit. Every unit is fitted when the
loop arrives at it, on weights that already carry the corrections of the columns before; a weight counts as much as its
error will cost once the columns after it have corrected it.
"""

from __future__ import annotations

import math

from fewbits.codecs.base import Codec, Params, Shape
from fewbits.lazy import torch
from fewbits.solvers.columns import sweep
from fewbits.solvers.curvature import Curvature
from fewbits.solvers.descent import descend, refit

ROWS = 8192  # of the weight at a time: what is copied stays small
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

    parts = [some(slice(at, at + ROWS)) for at in range(0, len(w), ROWS)]  # rows don't see each other
    return torch.cat([c for c, _ in parts]), {k: torch.cat([p[k] for _, p in parts]) for k in parts[0][1]}


def _rows(w: torch.Tensor, codec: Codec, bent: Curvature, state: Params | None,
          again: bool) -> tuple[torch.Tensor, Params]:
    """Some rows of the weight, all columns."""
    columns = w.shape[1]
    work = w.T[torch.cat(bent.order)].contiguous()  # [columns, rows]: a column lies in one piece
    codes = torch.empty(w.shape[::-1], dtype=torch.uint8, device=w.device)
    fitted: dict[int, Params] = {}
    at = 0
    for unit, local in zip(bent.order, bent.units, strict=True):
        cut = slice(at, at + len(unit))
        natural, place = unit.sort()  # the unit's columns as the file orders them, and where the loop keeps them
        first = int(natural[0]) // codec.unit(columns)
        x, own, position = work[cut], bent.upper[cut, cut], place.argsort()
        size = own.diagonal()[:, None]
        mix = own / size  # of an error that later columns take over
        known = None if state is None else {k: s[:, first] for k, s in state.items()}
        wanted = x[place]
        params = codec.fit(wanted.T, bent.importance[natural], known)
        values, errors = sweep(x, codec.grid(params, len(unit)), mix, position)
        if again:
            found = codec.grid(params, len(unit)).encode(values[place].T.contiguous())
            pull = local @ (wanted - values[place])
            better, _ = refit(codec, found, params, values[place], pull, local)
            if better is not params:
                others, wrong = sweep(x, codec.grid(better, len(unit)), mix, position)
                falls = (wrong / size).square().sum(0) < (errors / size).square().sum(0)
                values, errors = torch.where(falls, others, values), torch.where(falls, wrong, errors)
                params = {k: torch.where(falls[:, None], better[k], p) for k, p in params.items()}
        codes[natural] = codec.grid(params, len(unit)).encode(values[place].T.contiguous()).T
        work[cut.stop:].addmm_(bent.upper[cut, cut.stop:].T, errors / size, alpha=-1)
        fitted[first] = params
        at = cut.stop
    units = [fitted[k] for k in sorted(fitted)]
    return codes.T.contiguous(), {k: torch.stack([u[k] for u in units], dim=1) for k in units[0]}
