"""Solvers choose the codes of one weight for any codec: `solve(w, codec, "gptq", statistics)`.

A solver is a function `(w, codec, statistics) -> codes, params`: `w` float `[rows, columns]`, codes the same shape,
params `[rows, units, k]`. It sees only the codec interface.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from fewbits.calibrate import Statistics
from fewbits.codecs.base import Codec, Params, Planes
from fewbits.errors import FewbitsError
from fewbits.lazy import torch
from fewbits.qtensor import QTensor
from fewbits.solvers.gptq import gptq
from fewbits.solvers.gptq import refuses as gptq_refuses
from fewbits.solvers.nearest import nearest, search

PART = 1 << 18  # weights that a worker solves at a time
Solver = Callable[..., "tuple[torch.Tensor, Params]"]
SOLVERS: dict[str, Solver] = {"nearest": nearest, "search": search, "gptq": gptq}
NEEDS_STATISTICS = {"gptq"}


def refuses(solver: str, codec: Codec, shape: tuple[int, ...]) -> str | None:
    """Why `solver` cannot choose codes of `codec` for a weight of `shape`, or None."""
    if solver not in SOLVERS:
        raise FewbitsError(f"unknown solver {solver!r}", "one of: " + ", ".join(SOLVERS))
    return codec.check(shape) or (gptq_refuses(codec, shape) if solver == "gptq" else None)


def solve(w: torch.Tensor, codec: Codec, solver: str = "search", statistics: Statistics | None = None) -> QTensor:
    """Quantize one weight `[..., out, in]` of any float dtype.

    Rows are handled a few at a time where the solver treats them apart, so that memory stays near the packed size.

    Raises:
        FewbitsError: the codec or the solver cannot take the shape, or statistics are missing.
    """
    shape = tuple(w.shape)
    reason = refuses(solver, codec, shape)
    if reason:
        raise FewbitsError(f"{solver} into {codec.name} at shape {list(shape)}: {reason}")
    if solver in NEEDS_STATISTICS and statistics is None:
        raise FewbitsError(f"solver {solver} needs calibration text", "give one with --calibration FILE")
    if len(shape) > 2 and codec.stacks(shape) and not codec.rows_apart(shape):  # blocks end where a matrix ends
        planes = [solve(part, codec, solver, statistics).planes for part in w.flatten(0, -3)]
        return QTensor(codec, shape, {k: torch.cat([p[k] for p in planes]) for k in planes[0]})
    rows, columns = codec.matrix(shape)
    matrix = w.reshape(rows, columns)
    importance = statistics.importance(shape, (rows, columns)) if statistics is not None else None
    state = codec.begin(matrix, importance)
    if solver == "gptq" and statistics is not None:
        return QTensor.pack(codec, shape, *gptq(matrix.float(), codec, statistics, state))
    if not codec.rows_apart(shape):
        return QTensor.pack(codec, shape, *SOLVERS[solver](matrix.float(), codec, importance, state))

    def pack_rows(part: torch.Tensor) -> Planes:
        return codec.pack(*SOLVERS[solver](part.float(), codec, importance, state), (len(part), columns))

    # the same parts on every machine, so that the same input gives the same file; workers share the cores
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = list(pool.map(pack_rows, matrix.split(max(1, PART // max(1, columns)))))
    return QTensor(codec, shape, {k: torch.cat([p[k] for p in parts]) for k in parts[0]})

