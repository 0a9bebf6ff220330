"""`report.html`: everything in one file, no script, nothing loaded from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fewbits.measure.compare.candidates import Candidate, Comparison
from fewbits.measure.report import names, palette, pictures, words
from fewbits.measure.report.columns import columns

TEMPLATES = Path(__file__).parent / "templates"
WIDE, NARROW = 920, 350  # pixels; the style sheet shows the one that fits


def render(found: Comparison) -> str:
    """The page. All that comes from models and users is escaped."""
    engine = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
                                lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return engine.get_template("page.html").render(context(found))


def context(found: Comparison) -> dict[str, Any]:
    mapped = [c for c in found.candidates if c.layers]
    limits = pictures.scale(mapped)
    answer, *more = found.advice
    return {
        "found": found, "title": words.title(found), "headline": words.headline(answer), "answer": answer, "more": more,
        "columns": columns(found), "how": words.how(found), "notes": words.notes(found),
        "light": Markup(palette.variables(palette.LIGHT)), "dark": Markup(palette.variables(palette.DARK)),
        "quality": _both(pictures.quality, found), "undrawn": [c for c in found.measured if not pictures.drawable(c)],
        "speed": _both(pictures.speed, found) if any(c.speed for c in found.candidates) else "",
        "maps": [(c, Markup(pictures.svg(pictures.heat(c, limits), "heat"))) for c in mapped],
        "first_map": _first(mapped, answer.take), "legend": _legend(limits),
        "meanings": [(c.name, names.meaning(c)) for c in found.candidates]}


def _both(draw: Any, found: Comparison) -> Markup:
    return Markup(pictures.svg(draw(found, WIDE), "wide") + pictures.svg(draw(found, NARROW), "narrow"))


def _first(mapped: list[Candidate], take: str | None) -> int:
    """The map that is shown at first: that of the recommended format."""
    return next((i for i, c in enumerate(mapped) if c.name == take), 0)


def _legend(limits: tuple[float, float]) -> list[tuple[str, str]]:
    """(class, from this error on) of each colour."""
    step = (limits[1] - limits[0]) / pictures.COLOURS
    return [(f"h{i}", percent(10 ** (limits[0] + i * step))) for i in range(pictures.COLOURS)]


def percent(share: float) -> str:
    return f"{share * 1e6:.2g} ppm" if share < 1e-4 else f"{100 * share:.2g} %"
