"""The full comparison of SmolLM2, shuffled and wide, in sixteen recipes; the report opened in a browser.

Every recipe is calibrated on c4 (GPTQ; a search where blocks cross rows), or with --calibration none searched, and
measured on wikitext2-test. The reports go to --work/compare/MODEL, and are then opened in headless Chromium where that
is installed, light and dark, wide and narrow: see screenshots.py. It resumes, and measures only what is not yet known.

    python benchmarks/compare.py --quick    # tried in minutes: nothing calibrated, two chunks
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import screenshots
from common import parser, show

from fewbits.cli.common import progress, quiet_libraries
from fewbits.measure.compare import Comparison, compare
from fewbits.measure.report.columns import columns

MODELS = {"smollm2-135m": "g64", "smollm2-135m-wide": "g128"}  # and the groups that divide its width
RECIPES = ("Q2_K", "Q3_K_M", "Q4_0", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "int3-{}-asym", "int4-{}",
           "int4-g32", "nf4", "nf4-dq", "int8", "fp8-e4m3")


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", nargs="*", default=list(MODELS))
    p.add_argument("--chunks", type=int, default=20)
    p.add_argument("--calibration", default="c4", help="a text of the shared data, or none")
    p.add_argument("--samples", type=int, default=32)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--tasks", nargs="*", default=[], help="tasks to measure too, from the shared files")
    p.add_argument("--only", nargs="*", default=RECIPES, help="these recipes")
    p.add_argument("--quick", action="store_true")
    args = p.parse_args()
    quiet_libraries()
    wrong = 0
    for model in args.model:
        found = compared(args, model)
        shown = columns(found)
        show(f"{model}: {found.advice[0].take} is recommended", [c.title for c in shown],
             [[c.show(row) for c in shown] for row in found.candidates if not row.reason])
        for row in found.candidates:
            if row.reason:
                print(f"\n{row.name}: not measured: {row.reason}")
        for advice in found.advice:
            print(f"\n{advice.question} **{advice.take}** {advice.why}")
        wrong += looked_at(found.out / "report.html")
        if args.json:
            shutil.copyfile(found.out / "report.json", args.json.with_name(f"{args.json.stem}-{model}.json"))
    sys.exit(bool(wrong))


def compared(args, model: str) -> Comparison:
    out = args.work / "compare" / (model + ("-quick" if args.quick else ""))
    data = args.shared / "data"
    plain = args.quick or args.calibration == "none"
    calibration = "none" if plain else str(data / "text" / f"{args.calibration}.txt")
    short = {"chunks": 2, "prompt": 64, "generate": 16, "repeats": 2} if args.quick else {
        "chunks": args.chunks, "repeats": args.repeats}
    recipes = [recipe.format(MODELS.get(model, "g128")) for recipe in args.only]
    with progress() as report:
        return compare(args.models / model, recipes, out=out, keep=False, calibration=calibration,
                       text=str(data / "text" / "wikitext2-test.txt"), samples=args.samples, tasks=tuple(args.tasks),
                       task_files=str(data / "tasks") if args.tasks else None, progress=report, **short)


def looked_at(page: Path) -> int:
    """How many things are wrong with the page in a browser."""
    if not any(map(shutil.which, screenshots.NAMES)):
        print(f"\n{page} was not looked at: no Chromium is installed")
        return 0
    found = screenshots.check(page, page.parent / "screenshots")
    for setting, things in found.items():
        print(f"\n{page.parent.name} in a browser, {setting}: {'; '.join(things) or 'right'}")
    return sum(map(len, found.values()))


if __name__ == "__main__":
    main()
