"""Tokens decoded in a second by one thread, beside Transformers alone and on bitsandbytes' and gptqmodel's kernels.

    python benchmarks/decode.py [--model smollm2-135m] [--gptq int4-g64] [--decoded 64] [--rounds 2]

The same directories on both sides, made by fewbits: fp32 and bf16 as they are stored, bitsandbytes' nf4 and int8,
GPTQ. As `fewbits bench` measures: processes in turns, medians; nf4 in the faster of bitsandbytes' two types.
"""

from __future__ import annotations

from pathlib import Path

from common import ROOT, parser, show
from made import directory

from fewbits.cli.common import quiet_libraries
from fewbits.measure.speed import bench

BEFORE = 8
# recipe, beside whom, and the environment that has it
KINDS = {"fp32": ("F32", "transformers", "bnb"), "bf16": ("BF16", "transformers", "bnb"),
         "nf4": ("nf4", "bitsandbytes", "bnb"), "int8": ("int8", "bitsandbytes", "bnb"),
         "gptq": ("", "gptqmodel", "gptq")}


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--peers", type=Path, default=ROOT / ".peers")
    p.add_argument("--model", default="smollm2-135m", help="a folder of --models")
    p.add_argument("--gptq", default="int4-g64", help="recipe of the GPTQ directory")
    p.add_argument("--kinds", nargs="*", default=list(KINDS))
    p.add_argument("--decoded", type=int, default=64)
    p.add_argument("--rounds", type=int, default=2)
    args = p.parse_args()
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind in args.kinds:
        recipe, peer, environment = KINDS[kind]
        file = directory(args.models / args.model, args.work, recipe or args.gptq)
        ours, theirs = bench(file, prompts=[BEFORE], generate=[args.decoded], threads=1, repeats=args.rounds,
                             peers={peer: str(args.peers.absolute() / environment / "bin" / "python")})
        a, b = ours.decode_tokens_per_second, theirs.decode_tokens_per_second
        if a is None or b is None:
            raise SystemExit(f"{kind}: {ours.reason or theirs.reason}")
        rows.append((kind, a, f"{theirs.engine} ({theirs.kernel})", b, a / b))
        print(*(f"{v:.4g}" if isinstance(v, float) else v for v in rows[-1]), flush=True)
    show(f"{args.model}: tokens decoded in a second by one thread",
         ("weights", "fewbits", "beside", "", "x"), rows, args.json)


if __name__ == "__main__":
    main()
