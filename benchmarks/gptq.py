"""GPTQ against nearest and weighted search, for every codec: KL from the original on text that was not calibrated on.

Calibrated on c4, measured on wikitext2-test, on the wide SmolLM2 (every codec takes every width there).
"""

from __future__ import annotations

from common import parser, show

import fewbits
from fewbits.cli.common import progress, quiet_libraries
from fewbits.containers.base import remove

RECIPES = ("int4-g128", "int4-g128-asym", "int3-g32", "int3-g32-asym", "nf4", "nf4-dq", "fp4", "Q4_0", "Q4_K", "Q5_0",
           "Q6_K", "Q8_0", "int8")


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default="smollm2-135m-wide")
    p.add_argument("--recipes", nargs="*", default=RECIPES)
    p.add_argument("--solvers", nargs="*", default=("nearest", "search", "gptq"))
    p.add_argument("--samples", type=int, default=32)
    p.add_argument("--chunks", type=int, default=8)
    p.add_argument("--calibrate-on", default="c4")
    p.add_argument("--measure-on", default="wikitext2-test")
    args = p.parse_args()
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    model, texts = args.models / args.model, args.shared / "data" / "text"
    reference = fewbits.load(model)
    rows = []
    with progress() as report:
        for recipe in args.recipes:
            for solver in args.solvers:
                out = args.work / f"gptq-{recipe}-{solver}.any"
                remove(out)
                calibration = None if solver == "nearest" else texts / f"{args.calibrate_on}.txt"
                result = fewbits.quantize(model, out, recipe, solver=solver, samples=args.samples, progress=report,
                                          calibration=calibration)
                found = fewbits.evaluate(out, reference, text=texts / f"{args.measure_on}.txt",
                                         chunks=args.chunks, progress=report)
                remove(out)
                rows.append([recipe, solver, result.bits_per_weight, found.kl_mean, found.kl_99, found.top1,
                             found.perplexity, result.seconds])
                print(*rows[-1], flush=True)
    show(f"Solvers on {args.model}: {args.samples} x 512 tokens of {args.calibrate_on}, "
         f"{args.chunks} x 512 of {args.measure_on}",
         ["recipe", "solver", "bits/weight", "KL mean", "KL 99 %", "top-1", "perplexity", "seconds"], rows, args.json)
    best = {(r[0], r[1]): r[3] for r in rows}
    for recipe in args.recipes:
        if (recipe, "nearest") in best and (recipe, "gptq") in best:
            print(f"{recipe}: KL of gptq / KL of nearest = {best[recipe, 'gptq'] / best[recipe, 'nearest']:.3f}")


if __name__ == "__main__":
    main()
