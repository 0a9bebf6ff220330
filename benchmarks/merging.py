"""What merging an adapter into 4 bits costs: GPTQ of the sum beside rounding it, and beside merging into the codes.

    python benchmarks/merging.py [--model smollm2-135m-wide] [--types int4-g128 int4-g32] [--steps 150] [--adapter DIR]

A LoRA adapter of rank 16 is trained on the model in nf4 (QLoRA), on the first nine tenths of a text. The fine-tuned
model is that base, decoded, with the adapter, in float32. From it are counted: the adapter merged into the original in
16 bits; naive merging, which decodes the base, adds and rounds again to nearest (what peft does to a 4-bit layer), in
nf4 and in each type; and at each type's bytes the sum with the original, rounded to nearest and by GPTQ on the training
text, and the sum with the base by GPTQ. nf4 is itself far from the original: so divergence is counted from the adapter
on the original, in float32, too. All is on the last tenth of the text, computed by the native decoder.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from common import parser, show

import fewbits
from fewbits import adapters, containers
from fewbits.cli.common import quiet_libraries
from fewbits.codecs.floats import F32
from fewbits.containers.base import remove, write
from fewbits.finetuning.adapters import Lora
from fewbits.finetuning.loop import Settings

HEADER = ("what", "format", "bits/weight", "KL from the fine-tuned", "+-", "same top, %",
          "KL from the adapter on the original", "perplexity", "+-")
HELD = 0.1  # of the text
RATE, RANK = 2e-4, 16


def halves(text: Path, work: Path, most: int) -> tuple[Path, Path]:
    """What is learnt, and what is measured on: files of their own."""
    whole = text.read_text(encoding="utf-8")[:most]
    at = whole.rindex("\n", 0, int(len(whole) * (1 - HELD))) + 1
    files = work / "learn.txt", work / "held.txt"
    for file, part in zip(files, (whole[:at], whole[at:]), strict=True):
        file.write_text(part, encoding="utf-8")
    return files


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default="smollm2-135m-wide")
    p.add_argument("--text", default="code.txt")
    p.add_argument("--characters", type=int, default=2_000_000, help="of the text")
    p.add_argument("--types", nargs="+", default=["int4-g128", "int4-g32"])
    p.add_argument("--steps", type=int, default=150)
    p.add_argument("--adapter", type=Path, help="one that is there already, of the model in nf4")
    p.add_argument("--chunks", type=int, default=10)
    p.add_argument("--samples", type=int, default=32)
    args = p.parse_args()
    quiet_libraries()
    work = args.work / "merging"
    work.mkdir(parents=True, exist_ok=True)
    original, base = args.models / args.model, work / "nf4"
    learn, held = halves(args.shared / "data" / "text" / args.text, work, args.characters)
    if not base.exists():
        fewbits.quantize(original, base, "nf4", calibration="none")
    adapter, began = args.adapter or work / "adapter", time.monotonic()
    if not adapter.exists():
        settings = Settings(steps=args.steps, batch=1, length=512, rate=RATE, held_out=0.0)
        told = fewbits.finetune(base, adapter, data=learn, lora=Lora(rank=RANK, alpha=2 * RANK), settings=settings)
        print(f"trained in {time.monotonic() - began:.0f} s: {told.summary}")
    opened, tuned, ideal = containers.open(base), work / "tuned", work / "ideal"
    for path, out in ((base, tuned), (original, ideal)):  # in files, so that what they say is kept in the cache
        if not out.exists():
            source = containers.open(path)
            write(containers.by_name("transformers"), out,
                  adapters.applied(source, adapters.read(adapter, source), F32)[0])

    rows: list[tuple[Any, ...]] = []

    def measured(what: str, name: str, model: Any, bits: float) -> None:
        d, other = (fewbits.evaluate(model, against, text=held, chunks=args.chunks) for against in (tuned, ideal))
        rows.append((what, name, bits, d.kl_mean, d.kl_mean_error, 100 * (d.top1 or 0), other.kl_mean, d.perplexity,
                     d.perplexity_error))
        print("  ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in rows[-1]), flush=True)

    def merged(what: str, into: Path, to: str | None, **options: Any) -> None:
        out = work / "out"
        remove(out)
        found = fewbits.merge(adapter, into, out, to=to, text="none", trained_on=base, **options)
        measured(what, found.recipe, out, found.bits_per_weight)
        for file in (out, *work.glob("out.*")):
            remove(file)

    gptq = {"solver": "gptq", "calibration": learn, "samples": args.samples}
    nearest = {"solver": "nearest", "calibration": "none"}
    measured("fine-tuned", "F32", tuned, 32.0)
    measured("the adapter on the original", "F32", ideal, 32.0)
    measured("not fine-tuned", "original", original, 16.0)
    measured("the base that it was trained on", "nf4", base, opened.nbytes * 8 / opened.parameters)
    merged("merged into the original", original, None)
    merged("naive: into the base's own codes", base, "nf4", **nearest)
    for name in args.types:
        merged("naive: decoded base, rounded", base, name, **nearest)
        merged("into the original, rounded", original, name, **nearest)
        merged("into the decoded base, GPTQ", base, name, **gptq)
        merged("into the original, GPTQ", original, name, **gptq)
    show(f"Merging, {args.model} on {args.text}, {args.steps} steps, {args.chunks} x 512 tokens", HEADER, rows,
         args.json)


if __name__ == "__main__":
    main()
