"""The native decoder beside llama.cpp on the same GGUF files: tokens a second of decoding, and of a prompt.

    python benchmarks/cpu.py [--types Q4_K_M Q8_0 …] [--model smollm2-135m] [--threads 2] [--rounds 3]
    python benchmarks/cpu.py --prompt 4096 --before 4096 --decoded 32      # a long context

Prompt: 512 tokens at once, in a sequence that is empty. Decoding: 128 tokens after 8, one after the other, the most
likely taken; what they read of the weights in a second is beside the rate at which memory can be read, taken in the
same run. Each side runs in a process of its own, in turns, after a warm-up; medians of the rounds. llama.cpp keeps its
defaults but for the number of threads; it has flash attention on and off, the better counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from baselines import Peers, f16_gguf
from common import ROOT, parser, show
from kernels import limits

import fewbits
from fewbits import containers
from fewbits.cli.common import quiet_libraries
from fewbits.runtime import decoder

TYPES = ("Q4_0", "Q4_1", "Q4_K_M", "Q5_K_M", "Q8_0", "Q3_K_M", "Q2_K", "IQ4_XS")


def ours(file: Path, prompt: int, before: int, decoded: int) -> dict[str, float]:
    """Seconds of the prompt and of decoding, in this process; GB read in a second."""
    model = decoder.compile(containers.open(file))
    tokens = [i % 1000 + 100 for i in range(max(prompt, before))]
    model.sequence(8).append(tokens[:8])  # once before the clock runs
    start = time.perf_counter()
    model.sequence(prompt).append(tokens[:prompt])
    found = {"prompt": time.perf_counter() - start}
    sequence = model.sequence(before + decoded)
    logits = sequence.append(tokens[:before])
    start = time.perf_counter()
    for _ in range(decoded):
        logits = sequence.append([int(logits.argmax())])
    return found | {"decode": time.perf_counter() - start, "read": limits(torch.get_num_threads())[0]}


def token_bytes(file: Path) -> int:
    """Bytes of the weights that every token is multiplied with; of a table of tokens it takes a row."""
    entries = containers.open(file).entries
    tied = "lm_head.weight" not in entries
    return sum(e.nbytes for name, e in entries.items() if tied or name != "model.embed_tokens.weight")


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--peers", type=Path, default=ROOT / ".peers")
    p.add_argument("--model", default="smollm2-135m", help="a folder of --models")
    p.add_argument("--types", nargs="*", default=TYPES)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--before", type=int, default=8)
    p.add_argument("--decoded", type=int, default=128)
    p.add_argument("--one", type=Path, help="one run of ours, in this process")
    args = p.parse_args()
    quiet_libraries()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(ours(args.one, args.prompt, args.before, args.decoded)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    peers, rows = Peers(args.peers.absolute(), args.work.absolute()), []
    source = f16_gguf(args.models / args.model, args.work)
    for name in args.types:
        file = args.work / f"{args.model}-{name}-plain.gguf"
        if not file.exists():
            fewbits.quantize(source, file, name, calibration="none", finish="off")
        taken: dict[str, list[float]] = {"prompt": [], "decode": [], "read": [], "their prompt": [], "their decode": []}
        counts = {name: getattr(args, name) for name in ("prompt", "before", "decoded")}
        for _ in range(args.rounds):
            ran = subprocess.run([sys.executable, __file__, "--one", str(file), "--threads", str(args.threads),
                                  *(x for name, count in counts.items() for x in (f"--{name}", str(count)))],
                                 capture_output=True, text=True, check=True)
            for what, seconds in json.loads(ran.stdout.splitlines()[-1]).items():
                taken[what].append(seconds)
            found = args.work / "speed.json"
            peers.run("llama", "peer_llama.py", "speed", job={
                "model": str(file), "threads": args.threads, "found": str(found), **counts})
            for what, seconds in json.loads(found.read_text()).items():
                taken[f"their {what}"].append(seconds)
        prompt, decode, read, their_prompt, their_decode = (median(taken[k]) for k in taken)
        rows.append((name, args.decoded / decode, args.decoded / their_decode, their_decode / decode,
                     100 * token_bytes(file) * args.decoded / decode / read / 1e9,
                     args.prompt / prompt, args.prompt / their_prompt, their_prompt / prompt))
        print(*(f"{v:.4g}" if isinstance(v, float) else v for v in rows[-1]), flush=True)
    show(f"{args.model} on the CPU, {args.threads} thread(s): tokens a second",
         ("type", f"{args.decoded} after {args.before}", "llama.cpp", "x", "% of reading", f"prompt of {args.prompt}",
          "llama.cpp", "x"), rows, args.json)


if __name__ == "__main__":
    main()
