"""The native decoder beside llama.cpp on the same GGUF files: tokens a second of decoding, and of a prompt.

    python benchmarks/cpu.py [--types Q4_K_M Q8_0 …] [--model smollm2-135m] [--threads 2] [--rounds 3]
    python benchmarks/cpu.py --prompt 4096 --before 4096 --decoded 32      # a long context
    python benchmarks/cpu.py --batch 4 16

Prompt: 512 tokens at once, in a sequence that is empty. Decoding: 128 tokens after 8, one after the other, the most
likely taken; `--batch`: of so many sequences in a call. What decoding reads of the weights in a second is beside the
rate at which memory can be read, taken in the same run. As `fewbits bench` measures: each side in a process of its own,
in turns, after a warm-up; medians of the rounds. llama.cpp keeps its defaults but for the number of threads; it has
flash attention on and off, the better counts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from common import ROOT, parser, show
from kernels import limits
from made import plain_gguf

from fewbits import containers
from fewbits.cli.common import quiet_libraries
from fewbits.measure.speed import Speed, bench

TYPES = ("Q4_0", "Q4_1", "Q4_K_M", "Q5_K_M", "Q8_0", "Q3_K_M", "Q2_K", "IQ4_XS")


def token_bytes(file: Path) -> int:
    """Bytes of the weights that every token is multiplied with; of a table of tokens it takes a row."""
    entries = containers.open(file).entries
    tied = "lm_head.weight" not in entries
    return sum(e.nbytes for name, e in entries.items() if tied or name != "model.embed_tokens.weight")


def rates(found: list[Speed], figure: str) -> tuple[float, float, float]:
    ours, theirs = (getattr(row, figure) for row in found)
    return ours, theirs, ours / theirs


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--peers", type=Path, default=ROOT / ".peers")
    p.add_argument("--model", default="smollm2-135m", help="a folder of --models")
    p.add_argument("--types", nargs="*", default=TYPES)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--before", type=int, default=8)
    p.add_argument("--decoded", type=int, default=128)
    p.add_argument("--batch", type=int, nargs="*", default=[], help="numbers of sequences that are decoded at once")
    args = p.parse_args()
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"threads": args.threads, "repeats": args.rounds,
                               "peers": {"llama.cpp": str(args.peers.absolute() / "llama" / "bin" / "python")}}
    rows = list[tuple[Any, ...]]()
    for name in args.types:
        file = plain_gguf(args.models / args.model, args.work, name)
        decoded = bench(file, prompts=[args.before], generate=[args.decoded], batches=args.batch or [1], **options)
        pairs = [rates(decoded[i:i + 2], "decode_tokens_per_second") for i in range(0, len(decoded), 2)]
        if args.batch:
            rows += [(name, count, *pair) for count, pair in zip(sorted(args.batch), pairs, strict=True)]
        else:
            prompts = bench(file, prompts=[args.prompt], generate=[0], **options)
            read = 100 * token_bytes(file) * pairs[0][0] / 1e9 / limits(args.threads)[0]
            rows.append((name, *pairs[0], read, *rates(prompts, "prefill_tokens_per_second")))
        print(*(f"{v:.4g}" if isinstance(v, float) else v for v in rows[-1]), flush=True)
    sides, after = ("llama.cpp", "x"), f"{args.decoded} after {args.before}"
    heads = (("type", "sequences", after, *sides) if args.batch else
             ("type", after, *sides, "% of reading", f"prompt of {args.prompt}", *sides))
    show(f"{args.model} on the CPU, {args.threads} thread(s): tokens a second", heads, rows, args.json)


if __name__ == "__main__":
    main()
