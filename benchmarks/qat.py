"""Training as quantized against GPTQ, at the same bytes: divergence from the original on text that nobody learnt from.

    python benchmarks/qat.py [--model smollm2-135m] [--recipes int2-g64 int3-g64] [--steps 300] [--threads 1]

GPTQ on 64 x 512 tokens of c4; on top of it `finish --level quick` (scales and norms, 100 steps) and `finetune --qat`
(weights, scales and norms), both on c4 towards the original's logits. Files of an earlier call are measured again, not
made again; a killed training goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import parser, show

import fewbits
from fewbits.cli.common import quiet_libraries
from fewbits.finetuning.qat import SETTINGS, qat

Way = tuple[str, int, Path, Callable[[Path], Any]]  # its name, steps, where it goes, how it is made
HEADER = ("recipe", "bytes", "made by", "steps", "seconds", "KL", "+-", "top-1 %", "perplexity")


def made(out: Path, make: Callable[[Path], Any]) -> float:
    """Seconds that making it took, in this call or an earlier one; NaN where it was put there."""
    seconds = out.with_name(f"{out.name}.seconds")
    if not out.exists():
        began = time.monotonic()
        make(out)
        seconds.write_text(str(time.monotonic() - began))
    return float(seconds.read_text()) if seconds.exists() else float("nan")


def ways(args: Any, recipe: str) -> list[Way]:
    """What is compared, in the order of making: the later ones begin at GPTQ's file."""
    source, text = args.models / args.model, args.shared / "data/text/c4.txt"
    stem = args.work / f"{args.model}-{recipe}"
    gptq = Path(f"{stem}-gptq")
    settings = replace(SETTINGS, steps=args.steps, batch=1, length=512, rate=args.rate, held_out=0.014)
    return [("GPTQ", 0, gptq, lambda out: fewbits.quantize(source, out, recipe, calibration=text)),
            ("finish quick", 100, Path(f"{stem}-finished"),
             lambda out: fewbits.finish(gptq, out, source, calibration=text)),
            ("QAT", args.steps, Path(f"{stem}-qat-{args.steps}-{args.rate:g}-{args.scales}"),
             lambda out: qat(source, out, recipe, data=text, start=gptq, scales=args.scales, settings=settings,
                             progress=told))]


def size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.glob("*.safetensors"))


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default="smollm2-135m", help="a folder of --models")
    p.add_argument("--recipes", nargs="*", default=["int2-g64", "int3-g64"])
    p.add_argument("--steps", type=int, default=300, help="of one sequence of 512 tokens")
    p.add_argument("--rate", type=float, default=SETTINGS.rate)
    p.add_argument("--scales", default="learned")
    p.add_argument("--chunks", type=int, default=20, help="windows of 512 tokens of wikitext2-test")
    p.add_argument("--ways", nargs="*", default=["GPTQ", "finish quick", "QAT"], help="how files are made")
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    quiet_libraries()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    source, rows = args.models / args.model, list[tuple[Any, ...]]()
    for recipe in args.recipes:
        for way, steps, out, make in ways(args, recipe):
            if way not in args.ways:
                continue
            seconds = made(out, make)
            found = fewbits.evaluate(out, source, text=args.shared / "data/text/wikitext2-test.txt",
                                     chunks=args.chunks, kernel="decoded")
            assert found.kl_mean is not None and found.top1 is not None
            rows.append((recipe, size(out), way, steps, seconds, found.kl_mean, found.kl_mean_error,
                         100 * found.top1, found.perplexity))
            print(*rows[-1], flush=True)
    show(f"{args.model}: {args.chunks} x 512 tokens of wikitext2-test", HEADER, rows, args.json)


def told(what: str, done: int, total: int) -> None:
    if what.startswith("fine-tuning") and done % 10 == 0:
        print(what, done, total, flush=True)


if __name__ == "__main__":
    main()
