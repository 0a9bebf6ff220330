"""Does a report look right in a real browser? Light and dark, wide and narrow, and printed.

Opens the page in headless Chromium, one setting after the other; writes a picture of the whole page for each and a PDF,
and fails if the page is wider than its window, a text is cut off, covers another, is too small or too pale, or if
anything was loaded from anywhere.

    python benchmarks/screenshots.py demo-output/bench/compare/smollm2-135m/report.html
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from devtools import Browser

WIDTHS = (1280, 768, 390, 320)
SCHEMES = ("light", "dark")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

CHECK = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("page", type=Path)
    p.add_argument("--browser", help="Chromium's command; default: the first that is installed")
    p.add_argument("--out", type=Path, help="where the pictures go; default: beside the page")
    args = p.parse_args()
    found = check(args.page, args.out or args.page.parent / "screenshots", args.browser)
    for setting, wrong in found.items():
        print(f"{setting}: {'right' if not wrong else f'{len(wrong)} things wrong'}")
        for what in wrong:
            print(f"    {what}")
    sys.exit(any(found.values()))


def check(page: Path, out: Path, browser: str | None = None) -> dict[str, list[str]]:
    """What is wrong with the page in each setting; a picture of each, and a PDF, go to `out`."""
    command = browser or next((found for name in NAMES if (found := shutil.which(name))), None)
    if command is None:
        raise SystemExit("no Chromium is installed: give its command with --browser")
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    with tempfile.TemporaryDirectory() as profile:
        process = subprocess.Popen(
            [command, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
             "--hide-scrollbars", f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            tab = Browser(_address(Path(profile)))
            for scheme in SCHEMES:
                for width in WIDTHS:
                    found[f"{scheme} {width}"] = _look(tab, page, scheme, width, out / f"{scheme}-{width}.png")
            tab.call("Emulation.setEmulatedMedia", features=[])
            pdf = tab.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
            (out / "print.pdf").write_bytes(base64.b64decode(pdf["data"]))
        finally:
            process.terminate()
            process.wait(20)
    return found


def _address(profile: Path) -> str:
    """Where the browser's first tab takes commands."""
    file = profile / "DevToolsActivePort"
    for _ in range(200):
        if file.exists() and len(lines := file.read_text().split()) > 1:
            with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list") as answer:
                tabs = [t for t in json.load(answer) if t["type"] == "page"]
            if tabs:
                return str(tabs[0]["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise SystemExit("the browser does not answer")


def _look(tab: Browser, page: Path, scheme: str, width: int, picture: Path) -> list[str]:
    tab.call("Emulation.setEmulatedMedia", media="screen",
             features=[{"name": "prefers-color-scheme", "value": scheme}])
    tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    tab.call("Page.enable")
    tab.call("Page.navigate", url=page.resolve().as_uri())
    tab.wait("Page.loadEventFired")
    wrong: list[str] = json.loads(_evaluate(tab, CHECK))
    count = _evaluate(tab, "document.querySelectorAll('.heats > input').length")
    for i in range(count):  # every map is looked at
        _evaluate(tab, f"document.querySelectorAll('.heats > input')[{i}].click()")
        wrong += [w for w in json.loads(_evaluate(tab, CHECK)) if w not in wrong]
    tab.call("Page.reload")
    tab.wait("Page.loadEventFired")
    shot = tab.call("Page.captureScreenshot", captureBeyondViewport=True)
    picture.write_bytes(base64.b64decode(shot["data"]))
    return wrong


def _evaluate(tab: Browser, script: str) -> Any:
    found = tab.call("Runtime.evaluate", expression=script, returnByValue=True)
    if "exceptionDetails" in found:
        raise SystemExit(f"the check itself failed: {found['exceptionDetails']}")
    return found["result"].get("value")


if __name__ == "__main__":
    main()
