"""Solvers choose the codes of one weight for any codec: `solve(w, codec, "gptq", statistics)`.

A solver is a function `(w, codec, statistics) -> codes, params`: `w` float `[rows, columns]`, codes the same shape,
params `[rows, units, k]`. It sees only the codec interface.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from fewbits.calibration.statistics import Diagonal, Known, Statistics
from fewbits.codecs.base import Codec, Params, Planes, Shape
from fewbits.devices import at_once
from fewbits.errors import FewbitsError
from fewbits.lazy import torch
from fewbits.qtensor import CHUNK, QTensor
from fewbits.solvers.curvature import curvature
from fewbits.solvers.gptq import gptq
from fewbits.solvers.gptq import refuses as gptq_refuses
from fewbits.solvers.nearest import nearest, search

PART = 1 << 18  # weights that a worker solves at a time
Solver = Callable[..., "tuple[torch.Tensor, Params]"]
SOLVERS: dict[str, Solver] = {"nearest": nearest, "search": search, "gptq": gptq, "gptq-act-order": gptq}
NEEDS_STATISTICS = {"gptq", "gptq-act-order"}


def refuses(solver: str, codec: Codec, shape: tuple[int, ...]) -> str | None:
    """Why `solver` cannot choose codes of `codec` for a weight of `shape`, or None."""
    if solver not in SOLVERS:
        raise FewbitsError(f"unknown solver {solver!r}", "one of: " + ", ".join(SOLVERS))
    return codec.check(shape) or (gptq_refuses(codec, shape) if solver in NEEDS_STATISTICS else None)


class Solved(NamedTuple):
    """What a solver made of a weight; and by `loss`, where that was found on the way."""

    q: QTensor
    loss: float | None = None


def solve(w: torch.Tensor, codec: Codec, solver: str = "search", statistics: Known | None = None) -> QTensor:
    """Quantize one weight `[..., out, in]` of any float dtype; of a stack of experts each has its own statistics.

    Rows are handled a few at a time where the solver treats them apart, so that memory stays near the packed size.

    Raises:
        FewbitsError: the codec or the solver cannot take the shape, or statistics are missing.
    """
    return solve_and_measure(w, codec, solver, statistics).q


def solve_and_measure(w: torch.Tensor, codec: Codec, solver: str, statistics: Known | None) -> Solved:
    """`solve`, and what is lost by it where the codec's search finds both in one go."""
    shape = tuple(w.shape)
    reason = refuses(solver, codec, shape)
    if reason:
        raise FewbitsError(f"{solver} into {codec.name} at shape {list(shape)}: {reason}")
    if solver in NEEDS_STATISTICS and statistics is None:
        raise FewbitsError(f"solver {solver} needs calibration text", "give one with --calibration FILE")
    if solver in NEEDS_STATISTICS and isinstance(statistics, Diagonal):
        raise FewbitsError(f"solver {solver}: an importance matrix is only the diagonal of what it needs",
                           "take --solver search, or give a text with --calibration")
    if len(shape) > 2 and codec.stacks(shape) and (solver in NEEDS_STATISTICS or not codec.rows_apart(shape)):
        return Solved(_stacked(codec, shape, [solve(part, codec, solver, statistics.expert(i) if statistics else None)
                                              for i, part in enumerate(w.flatten(0, -3))]))
    rows, columns = codec.matrix(shape)
    matrix = w.reshape(rows, columns)
    if solver in NEEDS_STATISTICS:
        assert isinstance(statistics, Statistics)
        return Solved(_with_moments(matrix, codec, shape, statistics, solver == "gptq-act-order"))
    importance = statistics.importance(shape, (rows, columns)) if statistics is not None else None
    used = importance if solver == "search" else None
    done = codec.search(matrix, used) if codec.settled else None
    if done is not None:
        measured = statistics is None or isinstance(statistics, Diagonal) and used is not None
        return Solved(QTensor(codec, shape, done.planes), done.loss if measured else None)
    state = codec.begin(matrix, importance)
    if not codec.rows_apart(shape):
        return Solved(QTensor.pack(codec, shape, *SOLVERS[solver](matrix.float(), codec, importance, state)))

    def pack_rows(at: int) -> Planes:
        part = matrix[at:at + step].float()
        known = importance if importance is None or importance.ndim == 1 else importance[at:at + step]
        return codec.pack(*SOLVERS[solver](part, codec, known, state), (len(part), columns))

    # the same parts on every machine, so that the same input gives the same file; workers share the cores
    step = max(1, at_once(w.device, PART) // max(1, columns))
    starts = range(0, rows, step)
    if w.device.type != "cpu":
        parts = [pack_rows(at) for at in starts]
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            parts = list(pool.map(pack_rows, starts))
    return Solved(QTensor(codec, shape, {k: torch.cat([p[k] for p in parts]) for k in parts[0]}))


def solve_together(weights: list[torch.Tensor], codec: Codec, solver: str, statistics: Known | None) -> list[Solved]:
    """Weights that read the same, each as by `solve`. GPTQ, whose loop over columns costs little more for many rows
    than for few, takes those that are matrices as one."""
    as_one = solver in NEEDS_STATISTICS and len(weights) > 1 and all(
        w.ndim == 2 and codec.rows_apart(tuple(w.shape)) for w in weights)
    if not as_one:
        return [solve_and_measure(w, codec, solver, statistics) for w in weights]
    whole, parts, at = solve_and_measure(torch.cat(weights), codec, solver, statistics).q, list[Solved](), 0
    for w in weights:
        part, at = whole.part(slice(at, at + len(w))), at + len(w)
        parts.append(Solved(replace(part, planes={k: p.clone() for k, p in part.planes.items()})))
    return parts


def _with_moments(w: torch.Tensor, codec: Codec, shape: Shape, statistics: Statistics, act_order: bool) -> QTensor:
    """One matrix by GPTQ; in act-order columns are stored as they are rounded."""
    if len(statistics.moment) != w.shape[1]:
        raise FewbitsError(f"statistics of {len(statistics.moment)} inputs for a weight of {w.shape[1]} columns")
    bent = curvature(statistics, codec.unit(w.shape[1]), act_order)
    w = bent.target(w.float())
    q = QTensor.pack(codec, shape, *gptq(w, codec, bent, codec.begin(w, bent.importance)))
    return replace(q, order=bent.columns)


def _stacked(codec: Codec, shape: Shape, parts: list[QTensor]) -> QTensor:
    planes = {k: torch.cat([q.planes[k] for q in parts]) for k in parts[0].planes}
    orders = [q.order for q in parts if q.order is not None]
    return QTensor(codec, shape, planes, torch.stack(orders) if orders else None)


def loss(w: torch.Tensor, q: QTensor, statistics: Known | None) -> float:
    """tr((W - Q) H (W - Q)^T) / tr(W H W^T): the share of the layer's output, in squares, that quantizing changes; of
    experts together. H has only its diagonal where only that is known, and is the identity where nothing is."""
    off = whole = 0.0
    for part, decoded, known in _pieces(w, q, statistics):
        off += _squares(part - decoded, known)
        whole += _squares(part, known)
    return off / max(whole, 1e-30)


def _pieces(w: torch.Tensor, q: QTensor,
            statistics: Known | None) -> Iterator[tuple[torch.Tensor, torch.Tensor, Known | None]]:
    """Some rows of the weight, the same of `q` decoded, and what is known of their inputs."""
    rows, columns = q.shape[-2:]
    apart = q.codec.rows_apart(q.shape)
    decoded = None if apart else q.dequantize().view(-1, columns)
    step = max(1, at_once(q.device, CHUNK) // columns)
    for i in range(math.prod(q.shape[:-2])):
        known = statistics.expert(i) if statistics is not None and len(q.shape) > 2 else statistics
        for at in range(i * rows, (i + 1) * rows, step):
            some = slice(at, min(at + step, (i + 1) * rows))
            part = q.part(some).dequantize() if decoded is None else decoded[some]
            yield w.reshape(-1, columns)[some].float(), part, known


def _squares(x: torch.Tensor, known: Known | None) -> float:
    """tr(X H X^T)."""
    if isinstance(known, Statistics):
        return float(((x @ known.moment) * x).sum())
    return float((x.square() if known is None else x.square() * known.importance(x.shape, (len(x), x.shape[-1]))).sum())
