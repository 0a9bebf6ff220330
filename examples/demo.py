"""One real model, one recipe of each family: bits, size, divergence from the original, seconds, and a sentence."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from smollm2 import build

import fewbits
from fewbits.cli.common import progress, quiet_libraries, size
from fewbits.containers.base import remove
from fewbits.generate import Session

TEXT = Path(__file__).with_name("sample.txt")
DOCS = Path(__file__).parents[1] / "docs"  # any text will do to calibrate on, but not the one that is measured on
PROMPT = "Why is the sky blue? Answer in one sentence."
RECIPES = {
    "smollm2-Q8_0.gguf": "Q8_0",
    "smollm2-Q4_K_M.gguf": "Q4_K_M",
    "smollm2-int8": "int8",
    "smollm2-nf4-dq": "nf4-dq",
    "smollm2-int4-g128": "int4-g128",
    "smollm2-int4-g128-gptq": "int4-g128",
}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output")
    folder.mkdir(exist_ok=True)
    quiet_libraries()
    console = Console(width=110)
    original = build(folder)
    table = Table("file", "bits/weight", "size", "KL from original", "same top token", "seconds")
    sentences = {"(original)": _sentence(original)}
    reference = fewbits.load(original)
    first = fewbits.inspect(original)
    table.add_row(original.name, f"{first.bits_per_weight:.2f}", size(first.nbytes), "0", "100 %", "")
    with progress() as report:
        for name, recipe in RECIPES.items():
            remove(folder / name)
            result = fewbits.quantize(original, folder / name, recipe, progress=report,
                                      samples=24, calibration=_docs(folder) if name.endswith("gptq") else "none")
            found = fewbits.evaluate(folder / name, reference, text=TEXT, chunks=4, progress=report)
            table.add_row(name, f"{result.bits_per_weight:.2f}", size(result.nbytes), f"{found.kl_mean:.4f}",
                          f"{100 * found.top1:.1f} %", f"{result.seconds:.1f}")
            sentences[name] = _sentence(folder / name)
    console.print(table)
    for name, sentence in sentences.items():
        console.print(f"[bold]{name}[/bold]: {sentence}", highlight=False)


def _docs(folder: Path) -> Path:
    text = folder / "calibration.txt"
    text.write_text("\n".join(page.read_text() for page in sorted(DOCS.rglob("*.md"))))
    return text


def _sentence(model: Path) -> str:
    session = Session(model)
    return session.generate(session.encode(PROMPT), max_tokens=40).text.strip().split("\n")[0]


if __name__ == "__main__":
    main()
