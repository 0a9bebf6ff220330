"""`report.md`: the answer, the table and how it was measured, for a model card."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fewbits.measure.compare.candidates import Comparison
from fewbits.measure.report import words
from fewbits.measure.report.columns import columns

TITLES = {"quality-size.png": "Quality against size", "speed.png": "Speed", "layers.png": "Error by layer"}


def render(found: Comparison, pictures: Sequence[str] = ()) -> str:
    """The report as Markdown; `pictures` are files beside it."""
    shown = columns(found)
    answer, *more = found.advice
    lines = [f"# {escape(words.title(found))}", "", f"**{escape(words.headline(answer))}** {escape(answer.why)}", ""]
    lines += ["| " + " | ".join(c.title for c in shown) + " |",
              "|" + "|".join("---:" if c.number else "---" for c in shown) + "|"]
    for c in found.candidates:
        if c.reason:
            lines.append(f"| {escape(c.name)} | " + escape(f"not measured: {c.reason}") + " |" * (len(shown) - 1))
        else:
            lines.append("| " + " | ".join(escape(column.show(c)) for column in shown) + " |")
    lines += ["", "● nothing is both smaller and nearer to the original.", ""]
    for name in pictures:
        lines += [f"![{TITLES[name]}]({name})", ""]
    if more:
        lines += ["## And if …", ""]
        lines += [f"* {escape(a.question)} **{escape(a.take or 'none')}**: {escape(a.why)}" for a in more] + [""]
    lines += ["## How it was measured", ""]
    lines += [f"* {escape(name)}: {escape(value)}" for name, value in words.how(found)]
    lines += [f"* {escape(note)}" for note in words.notes(found)]
    return "\n".join([*lines, "", "```sh", *found.commands, "```", ""])


def escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", " ".join(text.split()))
