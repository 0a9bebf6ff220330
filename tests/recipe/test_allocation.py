"""Allocation beside brute force and beside a bound of Lagrange's; targets as text."""

from __future__ import annotations

import itertools
import random

import pytest

from fewbits.errors import FewbitsError
from fewbits.recipe import allocation
from fewbits.recipe.allocation import Option, Target, allocate, smallest, target


def problem(units: int, seed: int, several: int = 4) -> dict[str, list[Option]]:
    """Losses that fall about fourfold a bit, as those of real tensors do, on units of different sizes."""
    draw = random.Random(seed)
    found = {}
    for i in range(units):
        weights, worst = draw.choice((8, 16, 24, 64)), draw.lognormvariate(0, 1.5)
        found[f"t{i}"] = [Option(f"c{b}", weights * (b + 2), worst * weights * draw.uniform(0.7, 1.3) / 4 ** b)
                          for b in range(several)]
    return found


def best(options: dict[str, list[Option]], budget: int) -> float:
    """The least loss that any choice of at most `budget` bytes has."""
    return min(sum(o.loss for o in chosen) for chosen in itertools.product(*options.values())
               if sum(o.nbytes for o in chosen) <= budget)


def bound(options: dict[str, list[Option]], budget: int) -> float:
    """What no choice of at most `budget` bytes goes below: the best of Lagrange's bounds, over prices of a byte."""
    prices = [10 ** (k / 20) for k in range(-160, 61)]
    return max(sum(min(o.loss + price * o.nbytes for o in several) for several in options.values()) - price * budget
               for price in prices)


@pytest.mark.parametrize("seed", range(20))
def test_small_problems_beside_brute_force(seed: int) -> None:
    options = problem(6, seed)
    least, most = smallest(options), sum(max(o.nbytes for o in s) for s in options.values())
    for share in (0.0, 0.1, 0.37, 0.6, 1.0):
        budget = least + round(share * (most - least))
        chosen = allocate(options, budget)
        loss = sum(o.loss for o in chosen.values())
        assert chosen.keys() == options.keys() and sum(o.nbytes for o in chosen.values()) <= budget
        assert best(options, budget) == pytest.approx(loss)


@pytest.mark.parametrize("common", [1536, 1])
def test_many_units_end_near_the_bound(common: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes with a common divisor, as those of a model of 200 million weights, and without: in fewer steps."""
    monkeypatch.setattr(allocation, "STEPS", 20_000)
    options = {unit: [Option(o.codec, o.nbytes * common + (common == 1) * i, o.loss) for i, o in enumerate(several)]
               for unit, several in problem(120, 0, 6).items()}
    least, most = smallest(options), sum(max(o.nbytes for o in s) for s in options.values())
    for share in (0.1, 0.4):
        budget = least + round(share * (most - least))
        chosen = allocate(options, budget).values()
        assert sum(o.nbytes for o in chosen) <= budget
        assert bound(options, budget) <= sum(o.loss for o in chosen) <= 1.01 * bound(options, budget)


def test_what_is_rounded_up_stays_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "STEPS", 30)
    options = problem(6, 1)
    for budget in range(smallest(options), 2 * smallest(options), 7):
        chosen = allocate(options, budget).values()
        assert sum(o.nbytes for o in chosen) <= budget
        assert sum(o.loss for o in chosen) >= best(options, budget) - 1e-12


def test_what_is_above_the_hull_still_fills_the_room() -> None:
    options = {"a": [Option("small", 10, 3.0), Option("middle", 20, 2.9), Option("large", 30, 1.0)]}
    assert allocate(options, 25)["a"].codec == "middle"


def test_less_than_the_smallest_is_refused() -> None:
    options = problem(5, 0)
    with pytest.raises(FewbitsError, match=str(smallest(options))):
        allocate(options, smallest(options) - 1)


def test_targets() -> None:
    assert target("4.25bpw") == Target(bits=4.25) and target("3BPW") == Target(bits=3.0)
    assert target("Q4_K_M") is None
    for wrong in ("bpw", "0bpw", "-3bpw", "fourbpw"):
        with pytest.raises(FewbitsError, match="no bits per weight"):
            target(wrong)
