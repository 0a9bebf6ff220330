"""The check of pages in a browser finds what is wrong, and nothing in the report."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from fewbits.measure import report
from tests.conftest import ROOT
from tests.measure.compare.rows import comparison, row

LAYERS = tuple({"kind": kind, "layer": layer, "error": 10.0 ** -(layer / 5 + 1)} for kind in ("q", "k", "v", "down")
               for layer in range(24))


@pytest.fixture
def screenshots(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = importlib.import_module("screenshots")
    if not any(map(shutil.which, found.NAMES)):
        pytest.skip("needs Chromium")
    monkeypatch.setattr(found, "WIDTHS", (1280, 360))
    return found


def test_what_is_wrong_is_found(screenshots: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("""<!DOCTYPE html><body style="background: white"><p style="width: 1000px">wide</p>
        <p style="color: #ccc">pale</p><p style="width: 30px; overflow: hidden; white-space: nowrap">too long for it</p>
        <figure><svg width="100" height="50" viewBox="0 0 100 50"><text x="10" y="20">one</text>
        <text x="12" y="22">two</text><text x="80" y="20">outside</text><text x="5" y="45" font-size="5">tiny</text>
        </svg></figure>""")
    found = screenshots.check(page, tmp_path / "shots")
    assert set(found) == {"light 1280", "light 360", "dark 1280", "dark 360"}
    for wrong in ("cut off: too long", "one lies over two", "outside of its picture: outside", "contrast 1.6: pale",
                  "too small to read: tiny"):
        assert all(any(wrong in w for w in all_wrong) for all_wrong in found.values()), wrong
    assert any("beyond the window: wide" in w for w in found["light 360"])
    assert not any("beyond the window" in w for w in found["light 1280"])
    assert (tmp_path / "shots" / "dark-360.png").stat().st_size > 1000


def test_a_report_is_right(screenshots: ModuleType, tmp_path: Path) -> None:
    rows = [row(f"int4-g{i}" if i % 2 else f"Q{i}_K_M", 90 + 7 * i, 0.4 / (i + 1) ** 1.5, decode=50 - i,
                layers=LAYERS if i % 5 == 0 else (), notes=("a-very-long-word-" * 12,)) for i in range(14)]
    rows += [row("a-file-with-a-very-long-name-that-goes-on-and-on-and-on", 140, 0.1, decode=20),
             row("broken", 0, None, reason="a reason that is long: " + "x/" * 80)]
    report.write(comparison(*rows), tmp_path)
    found = screenshots.check(tmp_path / "report.html", tmp_path / "shots")
    assert found == dict.fromkeys(found, [])
