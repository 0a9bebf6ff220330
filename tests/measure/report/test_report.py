"""The report: what it says, that it is well made, and that nothing in a name gets out of its place."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fewbits.measure import report
from fewbits.measure.report import cards, markdown, names, page, palette, pictures
from fewbits.measure.report.columns import columns
from fewbits.measure.report.drawing import decades, steps
from tests.measure.compare.rows import ORIGINAL, comparison, row

LAYERS = tuple({"kind": kind, "layer": layer, "error": 10.0 ** -(layer + 2)} for kind in ("q", "down")
               for layer in range(3)) + ({"kind": "embedding", "layer": None, "error": 0.0},)
ROWS = (row("Q4_0", 300, 0.08, 0.9, decode=35, layers=LAYERS), row("Q8_0", 500, 0.01, 0.97, decode=20),
        row("IQ4_XS", 310, 0.09, 0.9, decode=30), row("exact", 900, 0.0, 1.0), row("bad", 0, None, reason="too wide"))


class Checked(HTMLParser):
    """Every element is closed in its place; what would load something is noted."""

    VOID = {"meta", "input", "br", "link", "img"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not [k for k, _ in attrs if k in ("src", "onload", "onclick", "onerror")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_stands_alone() -> None:
    text = page.render(comparison(*ROWS))
    checked = Checked()
    checked.feed(text)
    assert not checked.open and not {"script", "link", "img", "iframe"} & set(checked.seen)
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert text.index("Take Q8_0") < text.index("All figures") < text.index("Quality against size")
    assert "not measured: too wide" in text and "exact equals the original" in text


def test_the_table_shows_the_figures() -> None:
    found = comparison(*ROWS)
    shown = {c.title: c.show for c in columns(found)}
    q4 = found.candidates[1]
    assert shown["format"](q4) == "Q4_0 ●" and shown["format"](found.candidates[3]) == "IQ4_XS"
    assert shown["size"](q4) == "300 MB" and shown["KL mean"](q4) == "0.0800" and shown["KL 99 %"](q4) == "0.8000"
    assert shown["same token"](q4) == "90.0 %" and shown["perplexity ratio"](q4) == "1.0800 ± 0.0010"
    assert shown["loss"](q4) == "slight" and shown["reading"](q4) == "100" and shown["memory"](q4) == "310 MB"
    assert shown["KL mean"](ORIGINAL) == "–" and shown["made in"](ORIGINAL) == "–"
    assert "arc_easy acc" not in shown
    tasked = row("t", 1, 0.1, tasks=({"task": "arc_easy", "metric": "acc", "accuracy": 0.5, "error": 0.0354,
                                       "flipped": 3},))
    assert {c.title: c.show for c in columns(comparison(tasked))}["arc_easy acc"](tasked) == "50.0 ± 3.5 % (3)"


def test_names_from_outside_are_escaped() -> None:
    evil = '"><script>alert(1)</script>'
    bad = row(evil, 300, 0.08, layers=LAYERS, decode=3, notes=(f"[a](b) | {evil}",))
    found = comparison(bad, row("`x|y`", 310, 0.01), original=row(evil + "!", 1000, None, kind="original"))
    text = page.render(found)
    assert "<script" not in text and "&lt;script&gt;" in text
    table = [line for line in markdown.render(found).splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, "as many cells in each row"
    assert "<script" not in re.sub(r"\\<", "", markdown.render(found))


def test_what_is_no_number(tmp_path: Path) -> None:
    odd = row("odd", 300, math.nan, math.inf, quality={"kl_mean": math.nan, "kl_99": math.inf, "top1": math.nan})
    found = comparison(odd, row("unknown", 10, None))
    told = json.dumps(found.to_json(), allow_nan=False)
    assert '"nan"' in told and '"inf"' in told
    assert found.measured == [] and found.frontier == () and found.advice[0].take is None
    assert {c.title: c.show for c in columns(found)}["KL mean"](odd) == "nan"
    report.write(found, tmp_path)
    assert "nothing to draw" in (tmp_path / "report.html").read_text()


def test_one_candidate_only(tmp_path: Path) -> None:
    report.write(comparison(row("only", 300, 0.08, layers=LAYERS, decode=3)), tmp_path)
    assert (tmp_path / "quality-size.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_are_left_out_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "speed.png").write_text("of another run")
    monkeypatch.setattr(report, "has_matplotlib", lambda: False)
    written = report.write(comparison(*ROWS), tmp_path)
    assert {p.name for p in written} == {"report.html", "report.json", "report.md"} == {
        p.name for p in tmp_path.iterdir()}
    assert "png" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("width", [920, 350])
def test_every_point_is_drawn_once(width: int) -> None:
    found = comparison(*ROWS)
    drawn = ElementTree.fromstring(pictures.svg(pictures.quality(found, width)))
    titles = [e[0].text.split(":")[0] for e in drawn if e.get("class", "").startswith("mark")]
    assert sorted(titles) == ["IQ4_XS", "Q4_0", "Q8_0"], "zero has no logarithm"
    assert [e[0].text for e in drawn if "mark frontier" in e.get("class", "")][0].startswith("Q4_0")
    assert sum(e.text in ("IQ4_XS", "Q4_0", "Q8_0") for e in drawn.iter("text")) == 3


def test_bars_are_in_proportion() -> None:
    drawn = ElementTree.fromstring(pictures.svg(pictures.speed(comparison(*ROWS))))
    widths = {e[0].text: float(e.get("width")) for e in drawn.iter("rect")}
    assert widths["Q8_0: 20.0 tokens/s"] == pytest.approx(widths["Q4_0: 35.0 tokens/s"] * 20 / 35, rel=0.01)


def test_the_heat_map() -> None:
    limits = pictures.scale([ROWS[0]])
    assert limits == pytest.approx((-4, -2))
    assert [pictures.shade(e, limits) for e in (0, 1e-4, 1e-3, 1e-2, 1)] == [0, 0, 4, 8, 8]
    drawn = ElementTree.fromstring(pictures.svg(pictures.heat(ROWS[0], limits)))
    cells = {e[0].text: e.get("class") for e in drawn.iter("rect")}
    assert cells["q, layer 0: 1 %"] == "h8" and cells["down, layer 2: 0.01 %"] == "h0"
    assert len(cells) == 7 and cells["embedding: 0 %"] == "h0"


@pytest.mark.parametrize("value, text", [(0.0, "0"), (0.004, "<.01"), (0.52, ".52"), (3.14, "3.1"), (9.96, "10"),
                                         (24.4, "24"),
                                         (310.2, "310"), (1695.0, "1.7k"), (41234.0, "41k")])
def test_numbers_of_cells(value: float, text: str) -> None:
    assert pictures.number(value) == text


def test_axes() -> None:
    assert steps(88, 152, 4) == [100, 120, 140] and steps(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert decades(0.004, 0.6) == pytest.approx([0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    assert decades(1e-5, 1.0) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1])


def luminance(colour: str) -> float:
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_contrast(theme: dict[str, str]) -> None:
    for text in ("ink", "strong", "muted", "link", "note"):
        assert contrast(theme[text], theme["page"]) >= 4.5 and contrast(theme[text], theme["panel"]) >= 4.5, text
    assert contrast(theme["page"], theme["accent"]) >= 4.5
    for i in range(len(palette.HEAT)):
        assert contrast(theme[f"on-h{i}"], theme[f"h{i}"]) >= 4.5, i
    tones = [luminance(theme[f"h{i}"]) for i in range(len(palette.HEAT))]
    assert tones == sorted(tones, reverse=theme is palette.LIGHT), "readable without colour"


def test_cards_hold_every_map() -> None:
    drawing = cards.all_maps(comparison(ROWS[0], row("two", 400, 0.02, layers=LAYERS)))
    assert {s.text for s in drawing.shapes if getattr(s, "role", "") == "strong"} == {"Q4_0", "two"}


@pytest.mark.parametrize("name, words", [
    ("Q4_K_M", "mostly 4 bits"), ("Q2_K", "mostly 2 bits"), ("nf4-dq", "scales in 8 bits"), ("int8", "LLM.int8()"),
    ("int4-g128", "GPTQ-4bit-128g"), ("int3-g32-asym", "zero point for each 32"), ("Q8_0", "8 bits in blocks of 32"),
    ("my recipe", "a recipe of its own")])
def test_names_in_plain_words(name: str, words: str) -> None:
    meaning = names.meaning(row(name, 1, 0.1))
    assert words in meaning and "opens in llama.cpp" in meaning
