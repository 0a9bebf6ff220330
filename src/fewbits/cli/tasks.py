"""Answers to tasks, as `fewbits eval --tasks` prints them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from fewbits.measure.tasks import TaskResult


def table(results: Sequence[TaskResult]) -> Table:
    """A row for every task and metric; what compares only where there is a reference."""
    compared = any(r.difference is not None for r in results)
    beside = ("reference", "difference", "other answers", "worse", "better", "log p of the right one")
    out = Table("task", "metric", "questions", "right", *(beside if compared else ()), box=None, pad_edge=False)
    for r in results:
        row = [r.task, r.metric, str(r.questions), _percent(r.accuracy, r.error)]
        if r.difference is not None and r.difference_error is not None and r.reference_accuracy is not None and \
                r.log_probability_shift is not None and r.log_probability_shift_error is not None:
            row += [_percent(r.reference_accuracy), _percent(r.difference, r.difference_error, "+"), str(r.flipped),
                    str(r.right_to_wrong), str(r.wrong_to_right),
                    f"{r.log_probability_shift:+.3f}{_error(r.log_probability_shift_error, 3)}"]
        out.add_row(*row)
    return out


def _percent(share: float, error: float = math.nan, sign: str = "") -> str:
    return f"{100 * share:{sign}.1f}{_error(100 * error, 1)} %"


def _error(error: float, digits: int) -> str:
    return "" if math.isnan(error) else f" +- {error:.{digits}f}"
