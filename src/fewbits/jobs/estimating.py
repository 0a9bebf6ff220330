"""What quantizing will take, from shapes alone: time in multiply-adds, memory in bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from fewbits.checkpoint import Entry
from fewbits.codecs.base import Shape
from fewbits.containers import experts

# a search of parameters takes a weight as long as so many multiply-adds of a matrix product, GPTQ's loop and descent
# over columns as long as 20 a column (23 thousand in all a weight of int4-g128 at widths of 768 and 1536, on two cores)
SEARCH, COLUMN = 2_000, 20
WEIGHTS, FACTORS = 8, 7  # GPTQ's copies of what it solves, and of second moments while they are inverted
SEARCHED, HELD = 32, 8  # a search's copies of what it takes at a time; bytes a weight of what is taken apart


def solve_cost(shape: Shape, gptq: bool) -> int:
    """Solving one weight `[..., out, in]`."""
    return math.prod(shape) * (SEARCH + (COLUMN * shape[-1] if gptq else 0))


def walk_cost(entries: Iterable[Entry], tokens: int, drift: bool) -> int:
    """One block of the walk: a pass, with `drift` one of the original block too, and the second moments."""
    shapes = [e.shape for e in entries if len(e.shape) > 1]
    moments = sum(width ** 2 for width in {s[-1] for s in shapes})
    return tokens * (1 + drift) * (sum(math.prod(s) for s in shapes) + moments)


def search_bytes(shape: Shape, rows_apart: bool, at_once: int) -> int:
    """Memory of a search over one weight, `at_once` of it at a time where its rows are searched apart."""
    count = math.prod(shape)
    return HELD * count + 4 * SEARCHED * min(count, at_once) if rows_apart else 4 * WEIGHTS * count


def block_bytes(entries: Iterable[Entry], tokens: int, length: int, hidden: int, drift: bool) -> int:
    """Memory at the peak of one block, in float32: weights, activations of all `tokens`, the second moments of the
    widest layers (all their experts), what passes hold that wait for a layer; with `drift` all of these for the
    original block too. Then one batch of `length` tokens inside it, or the solving of its largest weights: those of a
    module that have equally many columns count as one."""
    entries = list(entries)
    moments: Counter[str] = Counter()
    together: Counter[tuple[str, int]] = Counter()
    for e in entries:
        if len(e.shape) > 1:
            moments[experts.stack_of(e.name)] += math.prod(e.shape[:-2]) * e.shape[-1] ** 2
            module = e.name.removesuffix(".weight").rpartition(".")[0] if len(e.shape) == 2 else e.name
            together[module, e.shape[-1]] += e.shape[-2]
    inside = length * (2 * hidden + 3 * max((e.shape[-2] for e in entries if len(e.shape) > 1), default=0))
    solving = max((WEIGHTS * rows * columns + FACTORS * columns ** 2 for (_, columns), rows in together.items()),
                  default=0)
    waiting = tokens * max((columns for _, columns in together), default=0)
    held = sum(e.parameters for e in entries) + max(moments.values(), default=0) + waiting + tokens * hidden
    return 4 * ((1 + drift) * held + max(inside, solving))
