"""The report of a comparison: `report.html`, one file that opens offline; `report.json`, `report.md`, pictures."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

from fewbits.measure.compare.candidates import Comparison

PICTURES = ("quality-size.png", "speed.png", "layers.png")


def write(found: Comparison, folder: Path) -> list[Path]:
    """Write all of it into `folder`, each file whole or not at all. Without matplotlib there are no pictures beside the
    page, and those that another run left are removed: they would show something else."""
    from fewbits.measure.report import cards, markdown, page

    drawn: list[Path] = []
    for name in PICTURES:
        (folder / name).unlink(missing_ok=True)
    if has_matplotlib():
        drawn = cards.write(found, folder)
    texts = {"report.json": json.dumps(found.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
             "report.md": markdown.render(found, [p.name for p in drawn]), "report.html": page.render(found)}
    for name, text in texts.items():
        partial = folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / name)
    return [*(folder / name for name in texts), *drawn]


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None
