"""The pictures as PNGs, for model cards: the same shapes as on the page, in its light colours, by matplotlib."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fewbits.measure.compare.candidates import Comparison
from fewbits.measure.report import pictures
from fewbits.measure.report.drawing import DASHES, Box, Drawing, Line, Mark, Shape, Text
from fewbits.measure.report.palette import LIGHT

PIXELS = 2  # of the file, for each of the drawing
MARGIN = 14
HEADING = 26  # room above a heat map for its name
INCH = 100  # pixels of a drawing; a letter's size is in points, 72 an inch
WEIGHTS = {"strong": "bold"}
THICK = {"grid": 0.7, "axis": 1.0, "limit": 1.0, "leader": 0.8, "frontier": 1.8, "spread": 1.2}


def write(found: Comparison, folder: Path) -> list[Path]:
    """`quality-size.png`, `speed.png` if speed was measured, `layers.png` if any weights were compared."""
    drawings = {"quality-size.png": pictures.quality(found)}
    if any(c.speed for c in found.candidates):
        drawings["speed.png"] = pictures.speed(found)
    if any(c.layers for c in found.candidates):
        drawings["layers.png"] = all_maps(found)
    for name, drawing in drawings.items():
        png(drawing, folder / name)
    return [folder / name for name in drawings]


def all_maps(found: Comparison) -> Drawing:
    """Every heat map under its name, one under the other."""
    shown = [c for c in found.candidates if c.layers]
    limits = pictures.scale(shown)
    maps = [pictures.heat(c, limits) for c in shown]
    out = Drawing(max(m.width for m in maps), sum(m.height + HEADING for m in maps), "Error by layer")
    top = 0.0
    for c, one in zip(shown, maps, strict=True):
        out.add(Text((0, top + 18), c.name, "strong", size=14), *(_lower(s, top + HEADING) for s in one.shapes))
        top += one.height + HEADING
    return out


def _lower(shape: Shape, by: float) -> Shape:
    if isinstance(shape, Line):
        return replace(shape, points=[(x, y + by) for x, y in shape.points])
    return replace(shape, at=(shape.at[0], shape.at[1] + by))


def png(drawing: Drawing, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = drawing.width + 2 * MARGIN, drawing.height + 2 * MARGIN
    figure = Figure(figsize=(width / INCH, height / INCH), dpi=INCH * PIXELS, facecolor=LIGHT["page"])
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-MARGIN, drawing.width + MARGIN), ylim=(drawing.height + MARGIN, -MARGIN))
    axes.axis("off")
    for order, shape in enumerate(drawing.shapes):
        _draw(axes, shape, order)
    figure.savefig(path, metadata={"Software": "fewbits"})


def _draw(axes: Any, shape: Shape, order: int) -> None:
    from matplotlib.patches import Circle, Polygon, Rectangle

    point = 72 / INCH
    if isinstance(shape, Line):
        xs, ys = zip(*shape.points, strict=True)
        dashes = [float(n) for n in DASHES.get(shape.role, "").split()]
        axes.plot(xs, ys, color=LIGHT[shape.role], linewidth=THICK[shape.role] * point * 1.3, zorder=order,
                  linestyle=(0, tuple(dashes)) if dashes else "-")
    elif isinstance(shape, Text):
        axes.text(*shape.at, shape.text.replace("$", r"\$"), color=LIGHT[shape.role], zorder=order,
                  fontsize=shape.size * point, weight=WEIGHTS.get(shape.role, "normal"), va="baseline",
                  ha={"start": "left", "middle": "center", "end": "right"}[shape.anchor],
                  rotation=90 if shape.turned else 0)
    elif isinstance(shape, Box):
        axes.add_patch(Rectangle(shape.at, shape.width, shape.height, color=LIGHT[shape.role], linewidth=0,
                                 zorder=order))
    elif isinstance(shape, Mark):
        filled = LIGHT["frontier"] if shape.role == "frontier" else LIGHT["page"]
        style: dict[str, Any] = {"facecolor": filled, "edgecolor": LIGHT[shape.role], "linewidth": 1.3, "zorder": order}
        axes.add_patch(Circle(shape.at, shape.size, **style) if shape.shape == "circle"
                       else Polygon(shape.corners, **style))
