"""What a task's answers come to: accuracy, and what changed from a reference on the same questions.

Two models are right and wrong on much the same questions, so the difference of their accuracies is known far better
than either: its error is that of the mean of the differences question by question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Answered:
    """One question by one metric."""

    score: float  # 1: right, 0: wrong, between them where the task has shares
    choice: int
    right: float  # natural logarithm of the probability of what is right


@dataclass(frozen=True)
class TaskResult:
    """By one metric, over `questions`. What compares is None without a reference; errors are standard errors."""

    task: str
    metric: str
    questions: int
    accuracy: float
    error: float
    reference_accuracy: float | None
    difference: float | None  # of the accuracies, the model's less the reference's
    difference_error: float | None
    flipped: int | None  # another choice than the reference's
    right_to_wrong: int | None
    wrong_to_right: int | None
    log_probability_shift: float | None  # of what is right, a mean, in nats
    log_probability_shift_error: float | None
    circumstances: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def result(task: str, metric: str, found: Sequence[Answered], reference: Sequence[Answered] | None,
           circumstances: dict[str, Any]) -> TaskResult:
    """Of answers to the same questions in the same order."""
    accuracy, error = mean([one.score for one in found])
    if reference is None:
        return TaskResult(task, metric, len(found), accuracy, error, None, None, None, None, None, None, None, None,
                          circumstances)
    pairs = list(zip(found, reference, strict=True))
    moved = [a.score - b.score for a, b in pairs]
    return TaskResult(task, metric, len(found), accuracy, error, mean([b.score for b in reference])[0], *mean(moved),
                      flipped=sum(a.choice != b.choice for a, b in pairs), right_to_wrong=moved.count(-1),
                      wrong_to_right=moved.count(1), circumstances=circumstances,
                      **dict(zip(("log_probability_shift", "log_probability_shift_error"),
                                 mean([a.right - b.right for a, b in pairs]), strict=True)))


def mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, as lm-evaluation-harness counts it; of one value that is not known."""
    n, middle = len(values), math.fsum(values) / len(values)
    if n == 1:
        return middle, math.nan
    return middle, math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (n - 1) / n)
