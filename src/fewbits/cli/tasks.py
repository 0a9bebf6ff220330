"""Answers to tasks, as `fewbits eval --tasks` prints them."""

from __future__ import annotations

from collections.abc import Sequence

from fewbits.measure.tasks import TaskResult


def table(results: Sequence[TaskResult]) -> str:
    """A line for every task and metric, shares in percent. Beside a reference also how many answers are others than
    its, worse and better, and what the right one's logarithm of probability moved by."""
    rows = [["task", "metric", "of", "right, %"]]
    if any(r.difference is not None for r in results):
        rows[0] += ["reference", "difference", "other", "worse", "better", "log p"]
    for r in results:
        rows.append([r.task, r.metric, str(r.questions), f"{100 * r.accuracy:.1f} +- {100 * r.error:.1f}"])
        if r.difference is not None:
            rows[-1] += [f"{100 * _known(r.reference_accuracy):.1f}",
                         f"{100 * r.difference:+.1f} +- {100 * _known(r.difference_error):.1f}", str(r.flipped),
                         str(r.right_to_wrong), str(r.wrong_to_right), f"{_known(r.log_probability_shift):+.3f}"]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _known(figure: float | None) -> float:
    assert figure is not None, "a result that has one of these has all"
    return figure
