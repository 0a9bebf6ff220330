"""Paired statistics, worked by hand."""

from __future__ import annotations

import math

import pytest

from fewbits.measure.tasks.paired import Answered, mean, result


def test_by_hand() -> None:
    """The differences of five questions are 0, -1, 0, 1, 0: mean 0, variance (1 + 1) / 4, error sqrt(0.5 / 5)."""
    found = [Answered(s, c, p) for s, c, p in [(1, 0, -1.0), (0, 2, -3.0), (0, 1, -2.0), (1, 3, -1.5), (0, 0, -4.0)]]
    before = [(1, 0, -1.0), (1, 1, -2.0), (0, 2, -2.5), (0, 0, -2.5), (0, 0, -4.0)]
    reference = [Answered(s, c, p) for s, c, p in before]
    one = result("t", "acc", found, reference, {"seed": 1})
    assert one.accuracy == one.reference_accuracy == 0.4
    assert one.error == pytest.approx(math.sqrt(0.4 * 0.6 * 5 / 4 / 5))
    assert one.difference == 0 and one.difference_error == pytest.approx(math.sqrt(0.1))
    assert (one.flipped, one.right_to_wrong, one.wrong_to_right) == (3, 1, 1)
    assert one.log_probability_shift == pytest.approx(0.1)  # 0, -1, 0.5, 1, 0
    assert one.to_json()["circumstances"] == {"seed": 1}


def test_the_same_answers_differ_by_nothing() -> None:
    found = [Answered(1, 0, -1.0), Answered(0, 1, -2.0), Answered(1, 0, -2.0)]
    one = result("t", "acc", found, found, {})
    assert one.difference == one.difference_error == one.log_probability_shift == one.flipped == 0
    assert one.error > 0.3


def test_pairs_know_more_than_two_accuracies() -> None:
    """A model that loses one question of twenty: its error is far below that of either accuracy."""
    reference = [Answered(i % 2, 0, -1.0) for i in range(20)]
    found = [Answered(0, 1, -1.0), *reference[1:19], Answered(0, 1, -1.0)]
    one = result("t", "acc", found, reference, {})
    assert one.difference == pytest.approx(-0.05) and one.difference_error == pytest.approx(0.05)
    assert one.error > 0.11 and one.right_to_wrong == 1 and one.flipped == 2


def test_without_a_reference() -> None:
    one = result("t", "acc", [Answered(0.25, 0, -1.0), Answered(0.75, 1, -1.0)], None, {})
    assert one.accuracy == 0.5 and one.error == pytest.approx(0.25)
    assert one.difference is one.flipped is one.log_probability_shift is None


def test_one_question_has_no_error() -> None:
    middle, error = mean([1.0])
    assert middle == 1 and math.isnan(error)
