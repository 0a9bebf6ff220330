"""GPTQ (Frantar et al., 2022) for any codec: round a column, spread its error over the columns still to come.

Order of columns: units by their summed importance, columns by importance inside a unit. Every unit is fitted when the
loop arrives at it, on weights that already carry the corrections of the columns before.
"""

from __future__ import annotations

import math

from fewbits.calibrate import Statistics
from fewbits.codecs.base import Codec, Params, Shape
from fewbits.errors import FewbitsError
from fewbits.lazy import torch

BLOCK = 128  # columns between two updates of all that follow
DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)  # shares of the mean diagonal, tried in turn


def refuses(codec: Codec, shape: Shape) -> str | None:
    if codec.matrix(shape) != (math.prod(shape[:-1]), shape[-1]):
        return f"blocks of {codec.name} cross rows at width {shape[-1]}, so columns cannot be rounded one by one"
    return None


def gptq(w: torch.Tensor, codec: Codec, statistics: Statistics,
         state: Params | None = None) -> tuple[torch.Tensor, Params]:
    """Codes `[rows, columns]` and params of `w`, minimising tr((W - Q) H (W - Q)^T) column by column.

    Raises:
        FewbitsError: statistics of another width, or a second moment that no damping makes positive definite.
    """
    columns = w.shape[1]
    moment = statistics.moment.to(w.dtype)
    if len(moment) != columns:
        raise FewbitsError(f"statistics of {len(moment)} inputs for a weight of {columns} columns")
    diagonal = moment.diagonal().clone()
    order = unit_order(diagonal, codec.unit(columns))
    permutation = torch.cat(order)
    upper = inverse_factor(moment[permutation][:, permutation])
    work = w[:, permutation].clone()
    codes: torch.Tensor | None = None
    fitted: dict[int, Params] = {}
    at = 0
    for unit in order:
        end, width = at + len(unit), len(unit)
        natural, place = unit.sort()  # the unit's columns as the file orders them, and where the loop keeps them
        position = torch.empty_like(place)
        position[place] = torch.arange(width)
        known = None if state is None else {k: s[:, int(natural[0]) // codec.unit(columns)] for k, s in state.items()}
        params = codec.fit(work[:, at:end][:, place], diagonal[natural], known)
        grid = codec.grid(params, width)
        for start in range(at, end, BLOCK):
            stop = min(start + BLOCK, end)
            errors = torch.empty(len(w), stop - start, dtype=w.dtype)
            for j in range(start, stop):
                column = int(position[j - at])
                only = grid.columns(slice(column, column + 1))
                code = only.encode(work[:, j:j + 1])
                if codes is None:
                    codes = torch.empty(w.shape, dtype=code.dtype)
                codes[:, permutation[j]] = code[:, 0]
                error = (work[:, j] - only.decode(code)[:, 0]) / upper[j, j]
                work[:, j + 1:stop] -= error[:, None] * upper[j, j + 1:stop]
                errors[:, j - start] = error
            work[:, stop:] -= errors @ upper[start:stop, stop:]
        fitted[int(natural[0])] = params
        at = end
    assert codes is not None
    units = [fitted[k] for k in sorted(fitted)]
    return codes, {k: torch.stack([u[k] for u in units], dim=1) for k in units[0]}


def unit_order(importance: torch.Tensor, unit: int) -> list[torch.Tensor]:
    """Columns of every unit, most important first; units by their summed importance."""
    groups = torch.arange(len(importance)).split(unit)
    groups = tuple(sorted(groups, key=lambda g: -float(importance[g].sum())))
    return [g[importance[g].argsort(descending=True, stable=True)] for g in groups]


def inverse_factor(moment: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped second moment; dead inputs count as independent."""
    moment = moment.clone()
    diagonal = moment.diagonal()  # a view
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if (~dead).any() else torch.ones((), dtype=moment.dtype)
    diagonal[dead] = mean
    clean = diagonal.clone()
    for share in DAMPING:
        diagonal.copy_(clean + share * mean)
        lower, failed = torch.linalg.cholesky_ex(moment)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and bool(upper.isfinite().all()):
            return upper
    raise FewbitsError(f"second moment of {len(moment)} inputs is not positive definite at any damping",
                       "use more calibration text")
