"""The three pictures of a comparison: quality against size, speed, error by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fewbits.measure.compare.candidates import Candidate, Comparison
from fewbits.measure.compare.choosing import GRADES, gigabytes
from fewbits.measure.report.drawing import Box, Drawing, Line, Mark, Point, Text, decades, steps, svg, text_width
from fewbits.measure.report.labels import MARK, Rect, along, leader, place

__all__ = ["COLOURS", "drawable", "heat", "quality", "scale", "speed", "svg"]

SHAPES = {"gguf": "circle", "bitsandbytes": "triangle", "gptq": "square"}  # of containers; others are diamonds
COLOURS = 9  # of the heat map, from least to most error
CELL, ROW, NAMES = 27, 23, 82  # pixels of the heat map: a layer, a kind of tensor, the kinds' names
MANY = 48  # layers from which on cells are narrow and hold no numbers


def short(name: str, letters: int = 26) -> str:
    """A name with its middle left out where it is long."""
    half = (letters - 1) // 2
    return name if len(name) <= letters else f"{name[:half]}…{name[-half:]}"


# quality against size -------------------------------------------------------------------------------------------------
def drawable(c: Candidate) -> bool:
    """Whether it has a place on a logarithmic scale."""
    return c.kl is not None and c.kl > 0 and c.nbytes > 0


def quality(found: Comparison, width: float = 920) -> Drawing:
    """Divergence over size, both logarithmic; the frontier as steps, the grades as lines across."""
    shown = [c for c in found.measured if drawable(c)]
    narrow = width < 600
    height, left, right, top, bottom = 500, 58, 16, 34, 56
    out = Drawing(width, height, "Divergence from the original over file size, one point for each format")
    if not shown:
        out.add(Text((width / 2, height / 2), "nothing to draw", "muted", "middle"))
        return out
    sizes, kls = [c.nbytes for c in shown], [c.kl or 1.0 for c in shown]
    room = max(1.05, (max(sizes) / min(sizes)) ** 0.1)  # at both sides
    low, high = min(sizes) / room, max(sizes) * room
    bottom_kl, top_kl = min(kls) / 1.6, max(kls) * 1.6

    def x(nbytes: float) -> float:
        return left + math.log(nbytes / low) / math.log(high / low) * (width - left - right)

    def y(kl: float) -> float:
        return top + math.log(top_kl / kl) / math.log(top_kl / bottom_kl) * (height - top - bottom)

    out.add(Text((2, 16), "KL divergence from the original (less is better)", "muted"))
    for value in decades(bottom_kl, top_kl):
        out.add(Line([(left, y(value)), (width - right, y(value))], "grid"),
                Text((left - 7, y(value) + 4), f"{value:.10f}".rstrip("0").rstrip("."), "muted", "end"))
    for value in steps(low, high, 4 if narrow else 8):
        middle = min(x(value), width - text_width(gigabytes(value)) / 2 - 2)
        out.add(Line([(x(value), height - bottom), (x(value), height - bottom + 5)], "axis"),
                Text((middle, height - bottom + 20), gigabytes(value), "muted", "middle"))
    out.add(Line([(left, height - bottom), (width - right, height - bottom)], "axis"),
            Text((width - right, height - 8), "size of all files (less is better)", "muted", "end"))
    edge = [c for c in shown if c.name in found.frontier]
    stairs: list[Point] = []
    for c in sorted(edge, key=lambda c: c.nbytes):
        if stairs:
            stairs.append((x(c.nbytes), stairs[-1][1]))
        stairs.append((x(c.nbytes), y(c.kl or 1.0)))
    if len(stairs) > 1:
        out.add(Line(stairs, "frontier"))
    at = [(x(c.nbytes), y(c.kl or 1.0)) for c in shown]
    words = []
    for g in (g for g in GRADES if bottom_kl < g.kl < top_kl):
        out.add(Line([(left, y(g.kl)), (width - right, y(g.kl))], "limit"))
        says = f"below: {g.name}" if narrow else f"below this line: {g.name}"
        words.append(_under(says, y(g.kl), left, width - right, [*at, *along(stairs)]))
        out.add(Text((words[-1].x, words[-1].y + 11), says, "muted", size=11))
    _points(out, found, shown, at, stairs, narrow,
            Rect(left + 2, top - 12, width - left - right, height - top - bottom + 10), words)
    return out


def _under(words: str, y: float, left: float, right: float, busy: Sequence[Point]) -> Rect:
    """Where words stand under a line across: to the right, or where fewer points are."""
    wide = text_width(words, 11)
    rects = [Rect(right - wide - step * (right - left - wide), y + 2, wide, 14) for step in (0, 1, 0.25, 0.5, 0.75)]
    return min(rects, key=lambda r: sum(math.dist(p, r.nearest(p)) < MARK + 2 for p in busy))


def _points(out: Drawing, found: Comparison, shown: Sequence[Candidate], at: Sequence[Point], stairs: Sequence[Point],
            narrow: bool, inside: Rect, taken: Sequence[Rect]) -> None:
    size = 11.0 if narrow else 12.5
    names = [short(c.name, 16 if narrow else 26) for c in shown]
    sizes = [(text_width(n, size, c.name in found.frontier) + 2, size + 3) for n, c in zip(names, shown, strict=True)]
    places = place(at, sizes, inside, stairs, taken)
    for point, rect in zip(at, places, strict=True):
        if line := leader(point, rect):
            out.add(Line(line, "leader"))
    for c, point, name, rect in zip(shown, at, names, places, strict=True):
        best, before = c.name in found.frontier, rect.x + rect.width / 2 < point[0]
        out.add(Mark(point, SHAPES.get(c.container, "diamond"), "frontier" if best else "other",
                     f"{c.name}: {gigabytes(c.nbytes)}, KL {c.kl:.4f}" + (", on the frontier" if best else "")),
                Text((rect.x + (rect.width - 1 if before else 1), rect.y + size), name, "strong" if best else "ink",
                     "end" if before else "start", size))


# speed ----------------------------------------------------------------------------------------------------------------
def speed(found: Comparison, width: float = 920) -> Drawing:
    """Tokens a second read and written: bars with their numbers, the original first; a line from the slowest to the
    fastest repetition."""
    rows = [c for c in found.candidates if c.speed]
    narrow = width < 600
    panels = (("prefill_tokens_per_second", "Reading the prompt, tokens/s"),
              ("decode_tokens_per_second", "Writing the answer, tokens/s"))
    high, head = 22, 30
    panel = head + len(rows) * high + 14
    out = Drawing(width, panel * (2 if narrow else 1), "Speed of each format: bars for reading and for writing")
    names = min(176.0, 20 + max((text_width(short(c.name, 22)) for c in rows), default=0))
    for i, (figure, title) in enumerate(panels):
        left, top = (0.0, i * panel) if narrow else (i * width / 2, 0.0)
        room = (width if narrow else width / 2 - 16) - names - 58
        most = max(_most(c, figure) for c in rows) or 1.0
        out.add(Text((left, top + 15), title, "strong", "start", 13))
        for j, c in enumerate(rows):
            y = top + head + j * high
            value = c.quick(figure)
            out.add(Text((left + names - 8, y + 14), short(c.name, 22), "ink", "end"))
            if value is None:
                out.add(Text((left + names, y + 14), "not measured", "muted"))
                continue
            words = f"{value:.0f}" if value >= 100 else f"{value:.1f}"
            role = "bar-first" if c is found.original else "bar"
            least, greatest = c.speed[0].get("spread", {}).get(figure, (value, value))
            per = room / most
            out.add(Box((left + names, y + 3), value * per, high - 7, role, f"{c.name}: {words} tokens/s"))
            if greatest - least > 0.01 * most:
                middle = y + 3 + (high - 7) / 2
                out.add(Line([(left + names + least * per, middle), (left + names + greatest * per, middle)], "spread"))
            out.add(Text((left + names + max(value, greatest) * per + 5, y + 14), words))
    return out


def _most(c: Candidate, figure: str) -> float:
    """The greatest of its repetitions."""
    return max(c.quick(figure) or 0.0, *c.speed[0].get("spread", {}).get(figure, (0.0,)))


# error by layer -------------------------------------------------------------------------------------------------------
def scale(shown: Sequence[Candidate]) -> tuple[float, float]:
    """Logarithms of the least and the largest error of all: one scale for all maps."""
    errors = [row["error"] for c in shown for row in c.layers if row["error"] > 0]
    if not errors:
        return -6.0, 0.0
    low, high = math.log10(min(errors)), math.log10(max(errors))
    return (low, high) if high - low > 0.1 else (low - 0.05, high + 0.05)


def shade(error: float, limits: tuple[float, float]) -> int:
    """Which of the colours an error has."""
    if error <= 0:
        return 0
    part = (math.log10(error) - limits[0]) / (limits[1] - limits[0])
    return min(COLOURS - 1, max(0, int(part * COLOURS)))


def heat(c: Candidate, limits: tuple[float, float]) -> Drawing:
    """Kinds of tensor down, layers across; in each cell its error in the unit that the corner names."""
    layers = max([row["layer"] for row in c.layers if row["layer"] is not None] or [0]) + 1
    kinds = list(dict.fromkeys(row["kind"] for row in c.layers))
    numbers = layers <= MANY
    cell = CELL if numbers else 11
    errors = sorted(row["error"] for row in c.layers)
    unit, words = (1e2, "%") if errors and errors[len(errors) // 2] >= 2e-3 else (1e6, "ppm")
    out = Drawing(NAMES + max(layers * cell, 8 * CELL) + 2, 22 + len(kinds) * ROW + 4,
                  f"Error of each weight of {c.name} by layer and kind of tensor")
    out.add(Text((0, 14), words if numbers else "layer", "muted", size=11))
    for layer in range(0, layers, 1 if numbers else 10):
        out.add(Text((NAMES + (layer + 0.5) * cell, 14), str(layer), "muted", "middle", 11))
    for i, kind in enumerate(kinds):
        out.add(Text((0, 22 + i * ROW + 16), kind, size=12.5))
    for row in c.layers:
        y, error = 22 + kinds.index(row["kind"]) * ROW, row["error"]
        whole = row["layer"] is None
        x, wide = (NAMES, layers * cell) if whole else (NAMES + row["layer"] * cell, cell)
        tone = f"h{shade(error, limits)}"
        where = row["kind"] if whole else f"{row['kind']}, layer {row['layer']}"
        out.add(Box((x, y), wide - 1, ROW - 1, tone, f"{where}: {100 * error:.3g} %"))
        if whole:
            out.add(Text((x + 6, y + 15), number(error * unit), f"on-{tone}", size=10))
        elif numbers:
            out.add(Text((x + wide / 2, y + 15), number(error * unit), f"on-{tone}", "middle", 10))
    return out


def number(value: float) -> str:
    """Two or three digits that tell, in four letters at most: .52, 3.1, 24, 310, 1.7k, 41k."""
    if value >= 995:
        return f"{value / 1000:.1f}k" if value < 9950 else f"{value / 1000:.0f}k"
    if value >= 9.95:
        return f"{value:.0f}"
    if value >= 0.995:
        return f"{value:.1f}"
    return f"{value:.2f}".lstrip("0") if value >= 0.005 else "<.01" if value > 0 else "0"
