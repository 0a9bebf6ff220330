"""GPTQ (Frantar et al., 2022) for any codec: round a column, spread its error over the columns still to come.

Order of columns: units by their summed importance, columns by importance inside a unit. Every unit is fitted when the
loop arrives at it, on weights that already carry the corrections of the columns before.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

from fewbits.calibrate import Statistics
from fewbits.codecs.base import Codec, Params, Shape
from fewbits.errors import FewbitsError
from fewbits.lazy import torch

BLOCK = 32  # columns between two updates of all that follow: so few that corrections inside a block stay in the cache
ROWS = 512  # of the weight that a worker solves at a time
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

    def some(rows: slice) -> tuple[torch.Tensor, Params]:
        known = None if state is None else {k: s[rows] for k, s in state.items()}
        return _rows(w[rows], codec, order, upper, diagonal, known)

    # rows don't see each other: the same parts on every machine, small enough for a core's cache, shared by the cores
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = list(pool.map(some, (slice(at, at + ROWS) for at in range(0, len(w), ROWS))))
    return torch.cat([c for c, _ in parts]), {k: torch.cat([p[k] for _, p in parts]) for k in parts[0][1]}


def _rows(w: torch.Tensor, codec: Codec, order: list[torch.Tensor], upper: torch.Tensor, diagonal: torch.Tensor,
          state: Params | None) -> tuple[torch.Tensor, Params]:
    """Some rows of the weight, all columns in `order`; `upper` is the factor for that order."""
    columns, permutation = w.shape[1], torch.cat(order)
    work = w.T[permutation].contiguous()  # [columns, rows]: a column lies in one piece
    codes: torch.Tensor | None = None
    fitted: dict[int, Params] = {}
    at = 0
    for unit in order:
        end, width = at + len(unit), len(unit)
        natural, place = unit.sort()  # the unit's columns as the file orders them, and where the loop keeps them
        position = torch.empty_like(place)
        position[place] = torch.arange(width)
        first = int(natural[0])
        known = None if state is None else {k: s[:, first // codec.unit(columns)] for k, s in state.items()}
        params = codec.fit(work[at:end][place].T, diagonal[natural], known)
        grid = codec.grid(params, width)
        for start in range(at, end, BLOCK):
            stop = min(start + BLOCK, end)
            errors = torch.empty(stop - start, len(w), dtype=w.dtype)
            for j, column in zip(range(start, stop), position[start - at:stop - at].tolist(), strict=True):
                only = grid.columns(slice(column, column + 1))
                code = only.encode(work[j, :, None])
                if codes is None:
                    codes = torch.empty(w.shape[::-1], dtype=code.dtype)
                codes[permutation[j]] = code[:, 0]
                error = errors[j - start] = (work[j] - only.decode(code)[:, 0]) / upper[j, j]
                work[j + 1:stop] -= upper[j, j + 1:stop, None] * error
            work[stop:] -= upper[start:stop, stop:].T @ errors
        fitted[first] = params
        at = end
    assert codes is not None
    units = [fitted[k] for k in sorted(fitted)]
    return codes.T.contiguous(), {k: torch.stack([u[k] for u in units], dim=1) for k in units[0]}


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
