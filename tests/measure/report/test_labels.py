"""Labels lie apart."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from fewbits.measure.report.labels import MARK, Rect, leader, place


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", [920, 350])
def test_sixteen_points_near_each_other(seed: int, width: int) -> None:
    draw = random.Random(seed)
    inside = Rect(60, 20, width - 80, 420)
    points = [(60 + (width - 80) * min(1.0, abs(draw.gauss(0.3, 0.2))), 20 + 420 * min(1.0, abs(draw.gauss(0.5, 0.25))))
              for _ in range(16)]
    sizes = [(draw.choice([30.0, 55.0, 80.0]), 15.0) for _ in points]
    found = place(points, sizes, inside)
    assert [(r.width, r.height) for r in found] == sizes
    for a, b in combinations(found, 2):
        assert a.overlap(b) == 0
    for r in found:
        assert r.x >= inside.x and r.x + r.width <= inside.x + inside.width + 1e-9
        assert r.y >= inside.y and r.y + r.height <= inside.y + inside.height + 1e-9
    assert found == place(points, sizes, inside)


def test_one_point_has_its_label_beside_it() -> None:
    (found,) = place([(100.0, 100.0)], [(40.0, 14.0)], Rect(0, 0, 300, 300))
    assert found.x > 100 and found.overlap(Rect(100 - MARK, 100 - MARK, 2 * MARK, 2 * MARK)) == 0
    assert leader((100.0, 100.0), found) == []
    assert leader((100.0, 100.0), Rect(200, 90, 40, 14)) == [(100.0, 100.0), (200, 100.0)]


def test_what_is_taken_stays_free() -> None:
    taken = Rect(105, 80, 100, 40)
    (found,) = place([(100.0, 100.0)], [(40.0, 14.0)], Rect(0, 0, 300, 300), taken=[taken])
    assert found.overlap(taken) == 0
