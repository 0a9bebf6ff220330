"""Which option does each unit of a model get, so that the sum of losses is least within a number of bytes?

A multiple-choice knapsack. The greedy walk over the lower convex hulls of all units is the optimum of every size that
it stops at (it is Lagrange's method, every multiplier in turn); what room is left is then filled by single changes and
by pairs of them. docs/concepts/allocation.md says how far from the optimum that ends.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fewbits.errors import FewbitsError

PAIRS = 400  # changes that are looked at two by two


@dataclass(frozen=True)
class Option:
    """What a unit may become."""

    codec: str
    nbytes: int
    loss: float


Options = Mapping[str, Sequence[Option]]  # of every unit


@dataclass(frozen=True)
class Target:
    """What the user asked for: bits of a weight on average, over all weights, or the bytes of the file."""

    bits: float | None = None
    nbytes: int | None = None

    @property
    def text(self) -> str:
        return f"{self.bits:g}bpw" if self.bits is not None else f"{self.nbytes} bytes"


def target(text: str) -> Target | None:
    """The target that `4.25bpw` names; None where the text is a recipe's name.

    Raises:
        FewbitsError: no number, or none above 0.
    """
    if not text.lower().endswith("bpw"):
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*", text[:-3])
    if not found or not float(found[1]) > 0:
        raise FewbitsError(f"--to {text!r}: no bits per weight", "for example 4.25bpw")
    return Target(bits=float(found[1]))


def smallest(options: Options) -> int:
    """Bytes of the least that all units together can take."""
    return sum(min(o.nbytes for o in several) for several in options.values())


def allocate(options: Options, budget_bytes: int) -> dict[str, Option]:
    """One option for every unit, together of at most `budget_bytes`, of about the least loss.

    Raises:
        FewbitsError: even the smallest options take more; how much they take is said.
    """
    least = smallest(options)
    if least > budget_bytes:
        raise FewbitsError(f"{budget_bytes} bytes: the least that these weights can take are {least}")
    hulls = {unit: hull(several) for unit, several in options.items()}
    chosen = {unit: steps[0] for unit, steps in hulls.items()}
    room = budget_bytes - sum(o.nbytes for o in chosen.values())
    steps = [(-_gain(a, b), unit, i + 1) for unit, found in hulls.items() for i, (a, b) in enumerate(pairwise(found))]
    heapq.heapify(steps)  # gains fall along a hull: a unit's steps come in order
    stopped: set[str] = set()
    while steps:
        _, unit, i = heapq.heappop(steps)
        step = hulls[unit][i]
        more = step.nbytes - chosen[unit].nbytes
        if unit in stopped or more > room:
            stopped.add(unit)
            continue
        chosen[unit], room = step, room - more
    while change := _best_change(options, chosen, room):
        for unit, option in change.items():
            room -= option.nbytes - chosen[unit].nbytes
            chosen[unit] = option
    return chosen


def hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of loss over bytes, from few bytes to many."""
    found: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.loss)):
        if found and option.loss >= found[-1].loss:
            continue
        while len(found) > 1 and _gain(found[-2], found[-1]) <= _gain(found[-1], option):
            found.pop()
        found.append(option)
    return found


def _gain(a: Option, b: Option) -> float:
    """What each byte brings from `a` to `b`."""
    return (a.loss - b.loss) / (b.nbytes - a.nbytes)


def _best_change(options: Options, chosen: Mapping[str, Option], room: int) -> dict[str, Option]:
    """Of one unit or of two, what lowers the loss most within `room`; empty where nothing does."""
    changes = [(o.loss - chosen[unit].loss, o.nbytes - chosen[unit].nbytes, unit, o)
               for unit, several in options.items() for o in several if o != chosen[unit]]
    best, found = 0.0, dict[str, Option]()
    for loss, more, unit, option in changes:
        if more <= room and loss < best:
            best, found = loss, {unit: option}
    better = sorted((c for c in changes if c[0] < 0 and c[1] > room), key=lambda c: c[0] / c[1])[:PAIRS]
    smaller = sorted((c for c in changes if c[1] < 0), key=lambda c: c[0] / -c[1])[:PAIRS]
    for loss, more, unit, option in better:
        for cost, less, other, smaller_option in smaller:
            if other != unit and more + less <= room and loss + cost < best - 1e-15:
                best, found = loss + cost, {unit: option, other: smaller_option}
    return found
