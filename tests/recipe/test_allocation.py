"""Allocation beside brute force and an exact dynamic programme; targets as text."""

from __future__ import annotations

import itertools
import random

import pytest

from fewbits.errors import FewbitsError
from fewbits.recipe.allocation import Option, Target, allocate, hull, smallest, target


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


def exact(options: dict[str, list[Option]], budget: int) -> float:
    """The same by dynamic programming over bytes."""
    least = [0.0] * (budget + 1)
    for several in options.values():
        least = [min((least[room - o.nbytes] + o.loss for o in several if o.nbytes <= room), default=float("inf"))
                 for room in range(budget + 1)]
    return least[budget]


@pytest.mark.parametrize("seed", range(20))
def test_small_problems_beside_brute_force(seed: int) -> None:
    options = problem(6, seed)
    least, most = smallest(options), sum(max(o.nbytes for o in s) for s in options.values())
    for share in (0.0, 0.1, 0.37, 0.6, 1.0):
        budget = least + round(share * (most - least))
        chosen = allocate(options, budget)
        loss = sum(o.loss for o in chosen.values())
        assert chosen.keys() == options.keys() and sum(o.nbytes for o in chosen.values()) <= budget
        assert best(options, budget) - 1e-12 <= loss <= 1.1 * best(options, budget)


@pytest.mark.parametrize("seed", range(3))
def test_the_gap_to_the_optimum_of_many_units_is_below_a_thousandth(seed: int) -> None:
    options = problem(120, seed, 6)
    least, most = smallest(options), sum(max(o.nbytes for o in s) for s in options.values())
    for share in (0.1, 0.4):
        budget = least + round(share * (most - least))
        loss = sum(o.loss for o in allocate(options, budget).values())
        optimum = exact(options, budget)
        assert optimum * (1 - 1e-9) <= loss <= 1.001 * optimum


def test_an_option_of_more_bytes_and_more_loss_is_never_taken() -> None:
    options = {"a": [Option("small", 10, 3.0), Option("bad", 20, 3.5), Option("large", 30, 1.0)]}
    assert [o.codec for o in hull(options["a"])] == ["small", "large"]
    assert allocate(options, 25)["a"].codec == "small" and allocate(options, 30)["a"].codec == "large"


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
