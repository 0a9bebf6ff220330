"""Places for the labels of points, so that none covers another, a point or the edge of the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from fewbits.measure.report.drawing import Point

ANGLES = [math.radians(a) for a in (0, 180, 270, 90, 315, 225, 45, 135, 20, 340, 160, 200)]
DISTANCES = (9, 14, 22, 32, 44, 58, 74, 92, 112)
SWEEPS = 6  # each label is moved that often while the others stay
NEARER = 80  # what it costs that a label without a line lies as near to another point as to its own
MARK = 7  # half the width of a point
FAR = 15  # from this distance on a line leads from the point to its label


@dataclass(frozen=True)
class Rect:
    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Rect) -> float:
        """Area in common."""
        wide = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        high = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(0.0, wide) * max(0.0, high)

    def nearest(self, point: Point) -> Point:
        """The point of the rectangle that is nearest to another."""
        return (min(max(point[0], self.x), self.x + self.width), min(max(point[1], self.y), self.y + self.height))


def place(points: Sequence[Point], sizes: Sequence[Point], inside: Rect, line: Sequence[Point] = (),
          taken: Sequence[Rect] = ()) -> list[Rect]:
    """A rectangle of its size for each point's label: near it, covering as little as can be of other labels, points,
    `line` and what is `taken`, and within `inside`."""
    marks = [Rect(x - MARK, y - MARK, 2 * MARK, 2 * MARK) for x, y in points]
    crumbs = [Rect(x - 2, y - 2, 4, 4) for x, y in along(line)]
    choices = [_choices(point, size, inside) for point, size in zip(points, sizes, strict=True)]
    placed: list[_Choice | None] = [None] * len(points)

    def cost(i: int, mine: _Choice) -> float:
        others = [p for j, p in enumerate(placed) if p is not None and j != i]
        covered = sum(mine.rect.overlap(r) for r in chain((p.rect for p in others), marks, taken))
        crossed = sum(any(p.rect.overlap(c) for c in mine.lead) or any(mine.rect.overlap(c) for c in p.lead)
                      for p in others)
        crossed += sum(any(m.overlap(c) for c in mine.lead) for j, m in enumerate(marks) if j != i)
        nearer = sum(math.dist(p, mine.rect.nearest(p)) < mine.distance + 3 for j, p in enumerate(points) if j != i)
        lined = sum(mine.rect.overlap(c) for c in crumbs)
        return 50 * covered + 400 * crossed + 6 * lined + NEARER * nearer * (not mine.lead) + mine.distance

    # points with many neighbours first: they have the least choice
    order = sorted(range(len(points)), key=lambda i: sum(math.dist(points[i], p) > 60 for p in points))
    for _ in range(SWEEPS):
        before = list(placed)
        for i in order:
            placed[i] = _cheapest(choices[i], partial(cost, i))
        if placed == before:
            break
    return [p.rect for p in placed if p is not None]


def _cheapest(choices: Sequence[_Choice], cost: Callable[[_Choice], float]) -> _Choice:
    """Of choices from near to far; none costs less than its distance."""
    best, least = choices[0], math.inf
    for choice in choices:
        if choice.distance >= least:
            break
        if (found := cost(choice)) < least:
            best, least = choice, found
    return best


@dataclass(frozen=True)
class _Choice:
    """A place for a label."""

    distance: float
    rect: Rect
    lead: list[Rect]  # where its line runs, if it has one


def _choices(point: Point, size: Point, inside: Rect) -> list[_Choice]:
    """Rectangles around a point, the nearest first; those that leave the picture are pushed back into it."""
    out = []
    for distance in DISTANCES:
        for preference, angle in enumerate(ANGLES):
            x, y = point[0] + distance * math.cos(angle), point[1] + distance * math.sin(angle)
            left = x - size[0] * (1 - math.cos(angle)) / 2
            top = y - size[1] * (1 - math.sin(angle)) / 2
            left = min(max(left, inside.x), inside.x + inside.width - size[0])
            top = min(max(top, inside.y), inside.y + inside.height - size[1])
            rect = Rect(left, top, *size)
            out.append(_Choice(math.dist(point, rect.nearest(point)) + 0.3 * preference, rect, _lead(point, rect)))
    return sorted(out, key=lambda choice: choice.distance)


def leader(point: Point, rect: Rect) -> list[Point]:
    """The line from a point to a label that lies far from it; empty for one that lies beside it."""
    end = rect.nearest(point)
    return [point, end] if math.dist(point, end) >= FAR else []


def _lead(point: Point, rect: Rect) -> list[Rect]:
    found = leader(point, rect)
    return [Rect(x - 2, y - 2, 4, 4) for x, y in along(found)][2:]  # beyond the point's own mark


def along(line: Sequence[Point]) -> list[Point]:
    """Points each few pixels along a line."""
    out: list[Point] = []
    for a, b in zip(line, line[1:], strict=False):
        count = max(1, int(math.dist(a, b) / 5))
        out += [(a[0] + (b[0] - a[0]) * i / count, a[1] + (b[1] - a[1]) * i / count) for i in range(count + 1)]
    return out
