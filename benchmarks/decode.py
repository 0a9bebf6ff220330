"""Tokens decoded in a second of one processor, beside Transformers alone and on bitsandbytes' and gptqmodel's kernels.

    python benchmarks/decode.py [--model smollm2-135m] [--gptq int4-g64] [--decoded 64] [--rounds 2]

Ours are directories in the same layouts, made by fewbits: fp32 and bf16 as they are stored, bitsandbytes' nf4 and
int8, GPTQ; theirs quantize the original when they load it, but for GPTQ's directory, which is the same one. One thread
each, in processes of their own, in turns; medians. Of the peers' settings (peer_decode.py) the fastest counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from baselines import Peers
from common import ROOT, parser, show

import fewbits
from fewbits import containers
from fewbits.cli.common import quiet_libraries
from fewbits.runtime import decoder

BEFORE = 8
PEER = {"fp32": "bnb", "bf16": "bnb", "nf4": "bnb", "int8": "bnb", "gptq": "gptq"}


def ours(path: Path, decoded: int) -> dict[str, float]:
    """Seconds of the clock and of all processors, in this process."""
    model = decoder.compile(containers.open(path))
    for count in (2, decoded):  # once before the clock runs
        sequence = model.sequence(BEFORE + decoded)
        sequence.append(range(100, 100 + BEFORE))
        token, wall, busy = 1, time.perf_counter(), time.process_time()
        for _ in range(count):
            token = int(sequence.append([token]).argmax())
    return {"wall": time.perf_counter() - wall, "busy": time.process_time() - busy}


def files(model: Path, work: Path, gptq: str) -> dict[str, Path]:
    """Directories of ours, made once."""
    found = {}
    for kind, recipe in {"fp32": "F32", "bf16": "BF16", "nf4": "nf4", "int8": "int8", "gptq": gptq}.items():
        found[kind] = work / f"{model.name}-{recipe}"
        if not found[kind].exists():
            fewbits.quantize(model, found[kind], recipe, calibration="none", finish="off")
    return found


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--peers", type=Path, default=ROOT / ".peers")
    p.add_argument("--model", default="smollm2-135m", help="a folder of --models")
    p.add_argument("--gptq", default="int4-g64", help="recipe of the GPTQ directory")
    p.add_argument("--kinds", nargs="*", default=list(PEER))
    p.add_argument("--decoded", type=int, default=64)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--one", type=Path, help="one run of ours, in this process")
    args = p.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    if args.one:
        print(json.dumps(ours(args.one, args.decoded)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    model, peers = args.models / args.model, Peers(args.peers.absolute(), args.work.absolute())
    made, rows, found = files(model, args.work, args.gptq), [], args.work / "decode.json"
    for kind in args.kinds:
        mine, theirs = [], []
        for _ in range(args.rounds):
            ran = subprocess.run([sys.executable, __file__, "--one", str(made[kind]), "--decoded", str(args.decoded)],
                                 capture_output=True, text=True, check=True)
            mine.append(json.loads(ran.stdout.splitlines()[-1])["busy"])
            peers.run(PEER[kind], "peer_decode.py", job={
                "model": str(made[kind] if kind == "gptq" else model), "kind": kind, "threads": 1, "before": BEFORE,
                "decoded": args.decoded, "found": str(found)})
            theirs.append(json.loads(found.read_text())["busy"])
        a, b = median(mine), median(theirs)
        rows.append((kind, args.decoded / a, args.decoded / b, b / a))
        print(*(f"{v:.4g}" if isinstance(v, float) else v for v in rows[-1]), flush=True)
    show(f"{args.model}: tokens decoded in a second of one processor",
         ("weights", "fewbits", "beside", "x"), rows, args.json)


if __name__ == "__main__":
    main()
