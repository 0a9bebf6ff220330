"""Frontier and recommendation, worked by hand."""

from __future__ import annotations

import math

import pytest

from fewbits.measure.compare.choosing import GRADES, advise, frontier, gigabytes, grade
from tests.measure.compare.rows import ORIGINAL, row


def test_the_frontier() -> None:
    rows = [row("a", 300, 0.1), row("b", 200, 0.2), row("beaten in both", 320, 0.3), row("c", 500, 0.01),
            row("as large as b, worse", 200, 0.25), row("as near as a, larger", 310, 0.1), row("unknown", 10, None)]
    assert [c.name for c in frontier(rows)] == ["b", "a", "c"]
    assert [c.name for c in frontier(reversed(rows))] == ["b", "a", "c"], "order does not matter"
    assert frontier([]) == []


@pytest.mark.parametrize("kl, top1, name", [
    (0.0, 1.0, "not noticeable"), (0.02, 0.93, "not noticeable"), (0.02, 0.92, "slight"), (0.021, 0.99, "slight"),
    (0.1, 0.85, "slight"), (0.3, 0.9, "clear"), (0.3, 0.6, "heavy"), (9.0, 0.0, "heavy")])
def test_grades(kl: float, top1: float, name: str) -> None:
    found = grade(row("x", 1, kl, top1))
    assert found is not None and GRADES[found].name == name


def test_a_divergence_that_is_no_number_has_no_grade() -> None:
    assert grade(row("x", 1, math.nan)) is None and frontier([row("x", 1, math.nan)]) == []
    assert grade(row("x", 1, 0.01, math.nan)) == 3, "without the share of equal tokens nothing is promised"


ROWS = [row("tiny", 200, 0.4, 0.75, decode=40), row("small", 300, 0.08, 0.9, decode=35),
        row("good", 400, 0.015, 0.95, decode=25), row("best", 600, 0.001, 0.99, decode=18),
        row("quick", 500, 0.05, 0.91, decode=50)]


def test_the_smallest_whose_loss_is_not_noticeable() -> None:
    answer, *more = advise(ORIGINAL, ROWS)
    assert answer.take == "good" and "2.5 times smaller" in answer.why and "95.0 %" in answer.why
    assert "25 tokens a second" in answer.why and "2.5 times as fast" in answer.why
    assert [(a.question, a.take) for a in more] == [
        ("The smallest with a slight loss at most?", "small"), ("The fastest with a slight loss at most?", "quick"),
        ("The nearest to the original at half its size?", "good"),
        ("The nearest to the original at a third of its size?", "small"),
        ("The nearest to the original at a quarter of its size?", "tiny")]


def test_within_a_memory() -> None:
    answer, *more = advise(ORIGINAL, ROWS, memory_bytes=320_000_000)
    assert answer.take == "small" and "loses least, and its loss is slight" in answer.why
    assert "310 MB of memory" in answer.why
    assert ("The nearest to the original in 320 MB of memory?", "small") in [(a.question, a.take) for a in more]
    (answer,) = advise(ORIGINAL, ROWS, memory_bytes=100_000_000)
    assert answer.take is None and "tiny, takes 210 MB" in answer.why


def test_memory_is_what_was_measured() -> None:
    thirsty = row("thirsty", 300, 0.01, decode=10, estimated_bytes=1)
    assert thirsty.memory_bytes == 310_000_000
    assert row("untimed", 300, 0.01, estimated_bytes=5).memory_bytes == 5


def test_the_program_decides_on_the_container() -> None:
    rows = [*ROWS, row("nf4", 350, 0.2, 0.8, container="bitsandbytes"),
            row("int8", 700, 0.005, 0.98, container="bitsandbytes")]
    more = advise(ORIGINAL, rows)[1:]
    assert {a.take for a in more if a.question.startswith("For ")} == {"good", "int8"}
    assert not any(a.question.startswith("For ") for a in advise(ORIGINAL, ROWS)), "one container: nothing to decide"


def test_nothing_measured() -> None:
    (answer,) = advise(ORIGINAL, [row("x", 1, None), row("y", 1, math.nan)])
    assert answer.take is None


def test_sizes_in_words() -> None:
    assert [gigabytes(n) for n in (2.5e9, 400e6, 91.7e6, 12e3)] == ["2.50 GB", "400 MB", "91.7 MB", "12 kB"]
