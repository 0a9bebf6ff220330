"""Which option does each unit of a model get, so that the sum of losses is least within a number of bytes?

A multiple-choice knapsack, solved by dynamic programming: exactly where sizes have a common divisor that leaves no more
than STEPS of them in the budget, as those of real models do; else with sizes rounded up to as many steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fewbits.errors import FewbitsError

STEPS = 200_000  # of room that are told apart


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
    """One option for every unit, together of at most `budget_bytes`, of the least loss.

    Raises:
        FewbitsError: even the smallest options take more; how much they take is said.
    """
    least = {unit: min(several, key=lambda o: o.nbytes) for unit, several in options.items()}
    spare = budget_bytes - smallest(options)
    if spare < 0:
        raise FewbitsError(f"{budget_bytes} bytes: the least that these weights can take are {smallest(options)}")
    more = {unit: [o.nbytes - least[unit].nbytes for o in several] for unit, several in options.items()}
    step = math.gcd(*(n for several in more.values() for n in several)) or 1
    step = max(step, -(-spare // STEPS))
    losses, taken = np.zeros(spare // step + 1), dict[str, np.ndarray]()  # the least loss within so many steps
    for unit, several in options.items():
        found = np.full((len(several), len(losses)), np.inf)
        for i, (option, nbytes) in enumerate(zip(several, more[unit], strict=True)):
            steps = -(-nbytes // step)
            if steps < len(losses):
                found[i, steps:] = losses[:len(losses) - steps] + option.loss
        taken[unit] = found.argmin(0).astype(np.uint8)
        losses = found.min(0)
    chosen, room = dict[str, Option](), len(losses) - 1
    for unit in reversed(list(options)):
        i = int(taken[unit][room])
        chosen[unit], room = options[unit][i], room - -(-more[unit][i] // step)
    return {unit: chosen[unit] for unit in options}
