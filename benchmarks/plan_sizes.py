"""Is `plan` right about sizes? Quantize small models into many recipes and compare with the files.

    python benchmarks/plan_sizes.py [--quick]
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from common import parser, show

from fewbits import FewbitsError, plan, quantize
from fewbits.inspection import size_on_disk

RECIPES = ("Q4_K_M", "Q8_0", "Q4_0", "Q6_K", "nf4", "nf4-dq", "int8", "int4-g128", "int3-g32-asym", "f16")
SOME = ("f16", "int8", "int4-g128", "nf4-dq", "Q8_0", "Q4_0")
PUBLISHED = (("smollm2-135m", "Q4_1", "SmolLM2-135M-Instruct.Q4_1.gguf"),
             ("gemma3-270m", "Q4_K_M", "gemma-3-270m.Q4_K_M.gguf"))  # a directory, and a file that others made of it
LIMIT = 2.0  # percent
Line = tuple[str, str, int, int, float, float]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--quick", action="store_true", help="the smallest model only")
    options = p.parse_args()
    models: list[tuple[Path, tuple[str, ...]]] = [(options.shared / "data/models/stories260k", RECIPES)]
    if not options.quick:
        models += [(options.models / "minilm", ("int8", "int4-g128")), (options.models / "smollm2-135m", SOME),
                   (options.models / "gemma3-270m", ("nf4", "Q8_0")),
                   (options.models / "gemma-3-270m.Q4_K_M.gguf", ("nf4-dq", "f16"))]
    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for path, recipes in models:
        if not path.exists():
            print(f"skipped: no {path}", file=sys.stderr)
            continue
        rows += list(compare(path, recipes, options.work))
    for name, recipe, file in PUBLISHED:
        if (options.models / file).exists() and (options.models / name).exists():
            planned = plan(options.models / name, recipes=[recipe]).rows[0].file_bytes
            rows.append(line(f"{name}, published", recipe, planned, (options.models / file).stat().st_size, 0.0))
    header = ("model", "recipe", "planned bytes", "real bytes", "difference %", "plan seconds")
    show("Sizes that plan names, and those of the files", header, rows, options.json)
    worst = max(abs(row[4]) for row in rows)
    print(f"\n{len(rows)} files, the largest difference is {worst:.3f} %")
    sys.exit(worst > LIMIT)


def line(name: str, recipe: str, planned: int, real: int, seconds: float) -> Line:
    found = name, recipe, planned, real, 100 * (planned / real - 1), seconds
    print(*found, file=sys.stderr)
    return found


def compare(path: Path, recipes: tuple[str, ...], work: Path) -> Iterator[Line]:
    for recipe in recipes:
        out = work / "planned.gguf" if "_" in recipe else work / "planned"
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
        began = time.monotonic()
        row = plan(path, recipes=[recipe]).rows[0]
        seconds = time.monotonic() - began
        try:
            quantize(path, out, recipe, solver="nearest")
        except FewbitsError as error:
            print(f"{path.name} {recipe}: {error}; planned: {row.reason or row.file_bytes}", file=sys.stderr)
            continue
        yield line(path.name, recipe, row.file_bytes, size_on_disk(out), seconds)
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
