"""What the benchmarks share: where models, texts and peers are, the machine in words, tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", type=Path, default=Path(os.environ.get("FEWBITS_MODELS", ROOT / ".models")))
    p.add_argument("--shared", type=Path, default=Path(os.environ.get("FEWBITS_SHARED", ROOT.parent / "shared")))
    p.add_argument("--work", type=Path, default=ROOT / "demo-output" / "bench", help="where files are written")
    p.add_argument("--json", type=Path, help="also write the figures here")
    return p


def machine() -> str:
    """Processor, cores, versions and date, in one line."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0] if names else model
    versions = ", ".join(f"{p} {version(p)}" for p in ("fewbits", "torch", "transformers"))
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}; {date.today()}"


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], target: Path | None = None) -> None:
    """A Markdown table on stdout, and the same as JSON where asked."""
    print(f"\n### {title}\n\n{machine()}\n\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row) + " |")
    if target:
        target.write_text(json.dumps({"title": title, "machine": machine(), "header": list(header),
                                      "rows": [list(r) for r in rows]}, indent=1))
