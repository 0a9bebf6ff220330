"""Pictures as lists of shapes in pixels: drawn once, rendered as SVG for the page and by matplotlib for cards.

Colours are named by what they are for; the page's style sheet gives them a value for light and one for dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float]
LETTER, BOLD = 0.59, 0.66  # mean width of a letter, in heights: of sans-serif fonts, rather more than less
DASHES = {"grid": "", "limit": "5 4", "leader": "", "frontier": ""}


@dataclass(frozen=True)
class Line:
    points: Sequence[Point]
    role: str  # grid, axis, limit, leader, frontier, spread


@dataclass(frozen=True)
class Text:
    at: Point  # the baseline's begin, middle or end, as `anchor` says
    text: str
    role: str = "ink"  # ink, muted, strong, or h0 … h8: what stands on that colour
    anchor: str = "start"  # start, middle, end
    size: float = 12.0
    turned: bool = False  # a quarter to the left


@dataclass(frozen=True)
class Mark:
    """A point of a scatter plot; what it stands for is told when it is pointed at."""

    at: Point
    shape: str  # circle, square, triangle, diamond
    role: str  # frontier, other
    title: str
    size: float = 5.5

    @property
    def corners(self) -> list[Point]:
        (x, y), r = self.at, self.size
        if self.shape == "square":
            return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
        if self.shape == "triangle":
            return [(x, y - 1.25 * r), (x + 1.2 * r, y + 0.9 * r), (x - 1.2 * r, y + 0.9 * r)]
        return [(x, y - 1.35 * r), (x + 1.35 * r, y), (x, y + 1.35 * r), (x - 1.35 * r, y)]


@dataclass(frozen=True)
class Box:
    at: Point  # its upper left corner
    width: float
    height: float
    role: str  # bar, bar-first, h0 … h8, none
    title: str = ""


Shape = Line | Text | Mark | Box


@dataclass
class Drawing:
    width: float
    height: float
    label: str  # what it shows, for those who cannot see it
    shapes: list[Shape] = field(default_factory=list)

    def add(self, *shapes: Shape) -> None:
        self.shapes += shapes


def text_width(text: str, size: float = 12.0, bold: bool = False) -> float:
    return len(text) * size * (BOLD if bold else LETTER)


# SVG ------------------------------------------------------------------------------------------------------------------
def svg(drawing: Drawing, kind: str = "") -> str:
    """One `<svg>` element; its colours are classes of the page's style sheet."""
    inner = "".join(_element(shape) for shape in drawing.shapes)
    return (f'<svg class="{escape(kind)}" viewBox="0 0 {drawing.width:g} {drawing.height:g}" '
            f'width="{drawing.width:g}" height="{drawing.height:g}" role="img" aria-label="{escape(drawing.label)}">'
            f"{inner}</svg>")


def _element(shape: Shape) -> str:
    if isinstance(shape, Line):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
        dash = f' stroke-dasharray="{DASHES[shape.role]}"' if DASHES.get(shape.role) else ""
        return f'<polyline class="line {shape.role}" points="{points}"{dash}/>'
    x, y = shape.at
    if isinstance(shape, Text):
        turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if shape.turned else ""
        return (f'<text class="{shape.role}" x="{x:.1f}" y="{y:.1f}" text-anchor="{shape.anchor}" '
                f'font-size="{shape.size:g}"{turned}>{escape(shape.text)}</text>')
    title = f"<title>{escape(shape.title)}</title>" if shape.title else ""
    if isinstance(shape, Box):
        return (f'<rect class="{shape.role}" x="{x:.1f}" y="{y:.1f}" width="{max(0, shape.width):.1f}" '
                f'height="{shape.height:.1f}">{title}</rect>')
    if shape.shape == "circle":
        return f'<circle class="mark {shape.role}" cx="{x:.1f}" cy="{y:.1f}" r="{shape.size:g}">{title}</circle>'
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in shape.corners)
    return f'<polygon class="mark {shape.role}" points="{points}">{title}</polygon>'


# axes -----------------------------------------------------------------------------------------------------------------
def steps(low: float, high: float, count: int) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    span = (high - low) or abs(high) or 1.0
    rough = span / max(1, count)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from `low` to `high`; powers alone where there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    within = (1,) if last - first > 4 else (1, 3) if last - first > 3 else (1, 2, 5)
    found = [m * 10.0 ** e for e in range(first, last + 1) for m in within]
    return [v for v in found if low * 0.999 <= v <= high * 1.001]
