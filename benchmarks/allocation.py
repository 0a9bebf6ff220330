"""What does sharing bits out bring beside the best uniform preset of the same size?

For each target (2.7, 3.0, 3.5, 4.0 and 4.5 bits a weight of all weights, the embedding's among them): the divergence of
`quantize --to N.Nbpw` from the original, beside what uniform recipes of that size have: llama.cpp's mixes, and every
matrix, the embedding too, in one codec. All by the same solver with the same statistics (search, weighted by an
importance matrix of c4; with --solver gptq, calibrated on that text), measured on wikitext2-test, which nobody saw.

What "the best uniform preset of the same size" has is told in three ways, from mild to strict: the best that there is
and that is no larger; log KL interpolated over bits between neighbours of the frontier (recipes that no smaller one is
as near as); the same on the lower convex hull, which no recipe lies below and few lie on.

Resumes: files and figures stay in --work.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from common import parser, show

import fewbits
from fewbits import allocating, containers, imatrix
from fewbits.calibration import sources
from fewbits.cli.common import progress, quiet_libraries
from fewbits.containers.base import remove
from fewbits.recipe.allocation import target

TARGETS = (2.7, 3.0, 3.5, 4.0, 4.5)
UNIFORM = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K")  # every matrix in one codec
MIXES = ("Q2_K_S", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "Q4_K_S", "Q4_K_M")
MATRICES = ("*_proj.weight", "model.embed_tokens.weight")


def matrix(args: Any) -> Path:
    """The importance matrix, collected once."""
    path = args.work / f"{args.model}-imatrix.gguf"
    if not path.exists():
        source = containers.open(args.models / args.model)
        with progress() as report:
            text = sources.calibration(args.shared / "data/text/c4.txt", source, samples=args.samples, length=512)
            imatrix.write(path, imatrix.collect(source, text, report))
    return path


def figures(name: str, to: str, overrides: list[str], args: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Bits, bytes, seconds and KL of one recipe, measured once."""
    if name not in known:
        out, c4 = args.work / f"{args.model}-{name}.gguf", str(args.shared / "data/text/c4.txt")
        remove(out)
        began = time.monotonic()
        by = {"calibration": c4, "samples": args.samples} if args.solver == "gptq" else {"imatrix": matrix(args)}
        with progress() as report:
            shared = share_out(to, c4, args, report) if to.endswith("bpw") else None
            result = fewbits.quantize(args.models / args.model, out, shared.recipe if shared else to,
                                      solver=args.solver, overrides=overrides, progress=report, **by)
            seconds = time.monotonic() - began
            found = fewbits.evaluate(out, args.models / args.model, text=args.shared / "data/text/wikitext2-test.txt",
                                     chunks=args.chunks, progress=report)
        known[name] = {"bits": result.bits_per_weight, "bytes": result.nbytes, "seconds": seconds, "kl": found.kl_mean,
                       "error": found.kl_mean_error, "top1": found.top1, "sharing": shared and shared.to_json()}
        (args.work / f"{args.model}-{args.solver}.json").write_text(json.dumps(known, indent=1))
        print(name, known[name], flush=True)
        if not args.keep:
            remove(out)
    return known[name]


def share_out(to: str, text: str, args: Any, report: Any) -> allocating.Allocation:
    """What `quantize --to` does first; by the same importances as the search of all others."""
    source, found = containers.open(args.models / args.model), target(to)
    assert found is not None
    importances = imatrix.read(matrix(args)).statistics(source)
    return allocating.for_file(source, found, "gguf", text, importances, progress=report)


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (bits, log KL) those that no smaller recipe is as near as."""
    found: list[tuple[float, float]] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of a frontier."""
    found: list[tuple[float, float]] = []
    for point in points:
        while len(found) > 1 and _slope(found[-2], found[-1]) >= _slope(found[-1], point):
            found.pop()
        found.append(point)
    return found


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def uniform_at(bits: float, curve: list[tuple[float, float]]) -> float:
    """KL of a uniform recipe of so many bits, on a curve."""
    for a, b in zip(curve, curve[1:], strict=False):
        if a[0] <= bits <= b[0]:
            return math.exp(a[1] + _slope(a, b) * (bits - a[0]))
    raise ValueError(f"{bits} bits are beyond the curve")


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default="smollm2-135m-wide")
    p.add_argument("--solver", choices=["search", "gptq"], default="search")
    p.add_argument("--targets", type=float, nargs="*", default=list(TARGETS))
    p.add_argument("--samples", type=int, default=32, help="sequences of 512 tokens that statistics are of")
    p.add_argument("--chunks", type=int, default=8)
    p.add_argument("--keep", action="store_true", help="keep the files")
    args = p.parse_args()
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / f"{args.model}-{args.solver}.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    presets = {f"all-{c}": figures(f"all-{c}", c, [f"{matrices}={c}" for matrices in MATRICES], args, known)
               for c in UNIFORM}  # a mix may have the name of a codec
    presets |= {m: figures(m, m, [], args, known) for m in MIXES}
    curve = frontier([(row["bits"], math.log(row["kl"])) for row in presets.values()])
    rows = []
    for bits in args.targets:
        row = figures(f"{bits}bpw", f"{bits}bpw", [], args, known)
        between, strict = uniform_at(row["bits"], curve), uniform_at(row["bits"], hull(curve))
        name, best = min(((n, r) for n, r in presets.items() if r["bits"] <= bits), key=lambda x: x[1]["kl"])
        rows.append([bits, row["bits"], row["bytes"], row["kl"], row["error"], name, best["kl"], row["kl"] / best["kl"],
                     row["kl"] / between, row["kl"] / strict, row["seconds"]])
    show(f"Uniform recipes, {args.solver}, wikitext2-test {args.chunks} x 512", ["recipe", "bits", "bytes", "KL",
         "+-", "top-1", "seconds"], [[n, r["bits"], r["bytes"], r["kl"], r["error"], r["top1"], r["seconds"]]
                                     for n, r in sorted(presets.items(), key=lambda x: x[1]["bits"])])
    show(f"Bits shared out, {args.solver}", ["target", "bits", "bytes", "KL", "+-", "best no larger", "its KL",
         "ratio to it", "between neighbours", "hull", "seconds"], rows, args.json)


if __name__ == "__main__":
    main()
