"""What quantizing will take, from shapes alone: time in multiply-adds, memory in bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fewbits.checkpoint import Entry
from fewbits.codecs.base import Shape

# a search of parameters takes a weight as long as so many multiply-adds of a matrix product (between 12 and 48
# thousand, codec by codec; int4 512 x 1536 on one core), GPTQ's loop over columns as long as 20 a column
SEARCH, COLUMN = 20_000, 20


def solve_cost(shape: Shape, gptq: bool) -> int:
    """Solving one weight `[..., out, in]`."""
    return math.prod(shape) * (SEARCH + (COLUMN * shape[-1] if gptq else 0))


def walk_cost(entries: Iterable[Entry], tokens: int) -> int:
    """One block: two runs, and the second moments between them."""
    shapes = [e.shape for e in entries if len(e.shape) > 1]
    return tokens * (2 * sum(math.prod(s) for s in shapes) + _moments(shapes))


def block_bytes(entries: Iterable[Entry], tokens: int, length: int, hidden: int) -> int:
    """Memory at the peak of one block, in float32: weights, second moments, the activations of all `tokens` before and
    after it, and either one batch of `length` tokens inside it or the solving of its largest weight."""
    entries = list(entries)
    shapes = [e.shape for e in entries if len(e.shape) > 1]
    inside = length * (2 * hidden + 3 * max((s[-2] for s in shapes), default=0))
    solving = max((2 * s[-2] * s[-1] + 3 * s[-1] ** 2 for s in shapes), default=0)
    return 4 * (sum(e.parameters for e in entries) + _moments(shapes) + 2 * tokens * hidden + max(inside, solving))


def _moments(shapes: list[Shape]) -> int:
    """Elements of all second moments: layers of one width mostly share theirs, experts don't."""
    return sum(math.prod(lead) * width ** 2 for *lead, width in {(*s[:-2], s[-1]) for s in shapes})
