"""Squared error of every codec on real weights, relative to their squares: the column of docs/formats/README.md.

The first rows of every matrix of a Transformers directory, solver "search", no importances. Whole rows are taken, so
codecs with one scale a row meet real rows; codecs with one scale a tensor or a tile see these rows as the tensor.
"""

from __future__ import annotations

from pathlib import Path

from common import parser, show

NAMES = ("Q8_0", "int8-g128", "int8", "fp8-e4m3", "fp8-e4m3-b128", "fp8-e5m2", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1",
         "Q4_K", "IQ4_NL", "nf4", "nf4-dq", "fp4", "fp4-dq", "Q4_0", "int4-g32", "kmeans4", "IQ4_XS", "MXFP4",
         "int4-g128", "int4-g128-asym", "int3-g32-asym", "Q3_K", "int3-g64", "kmeans3", "Q2_K", "int2-g64", "kmeans2",
         "TQ2_0", "Q1_0")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", type=Path, help="by default smollm2-135m-wide")
    options.add_argument("--rows", type=int, default=64, help="of every matrix")
    args = options.parse_args()
    from fewbits import codecs, containers
    from fewbits.solvers import solve

    source = containers.open(args.model or args.models / "smollm2-135m-wide")
    matrices = [e for e in source.entries.values() if len(e.shape) == 2 and "embed" not in e.name][::4]
    rows = []
    for name in NAMES:
        codec = codecs.get(name)
        error = total = weights = nbytes = 0.0
        for entry in matrices:
            w = entry.load().dequantize()[:args.rows]
            if codec.check(tuple(w.shape)):
                continue
            q = solve(w, codec)
            error += float((q.dequantize() - w).double().square().sum())
            total += float(w.double().square().sum())
            weights, nbytes = weights + w.numel(), nbytes + q.nbytes
        rows.append([name, 8 * nbytes / weights, 1000 * error / total, len(matrices)])
        print(rows[-1], flush=True)
    show("Error of codecs", ["codec", "bits a weight", "squared error over squares, thousandths", "matrices"], rows,
         args.json)


if __name__ == "__main__":
    main()
