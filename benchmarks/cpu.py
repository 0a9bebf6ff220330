"""The native decoder beside llama.cpp on the same GGUF files: tokens a second of decoding, and of a prompt.

    python benchmarks/cpu.py [--types Q4_K_M Q8_0 …] [--model smollm2-135m] [--threads 2] [--rounds 3] [--prompt 512]
    python benchmarks/cpu.py --batch 4 16

Prompt: 512 tokens at once, in a sequence that is empty. Decoding: 128 tokens after 8, one after the other, the most
likely taken; `--batch`: of so many sequences in a call. `--before 4096` decodes after so many tokens. Each side runs
in a process of its own, in turns, after a warm-up; medians of the rounds. llama.cpp keeps its defaults but for the
number of threads; it has flash attention on and off, the better counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from baselines import Peers, f16_gguf
from common import ROOT, parser, show

import fewbits
from fewbits import containers
from fewbits.cli.common import quiet_libraries
from fewbits.runtime import decoder

TYPES = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0", "Q3_K_M", "Q2_K")
PROMPT, BEFORE, DECODED = 512, 8, 128


def batch(file: Path, count: int, before: int) -> float:
    """Seconds of decoding `count` sequences at once, in this process."""
    model = decoder.compile(containers.open(file))
    several = [model.sequence(before + DECODED) for _ in range(count)]
    for k, sequence in enumerate(several):
        sequence.append([100 + k + p for p in range(before)])
    tokens = [1] * count
    start = time.perf_counter()
    for _ in range(DECODED):
        logits = model.step([(sequence, [token], 1) for sequence, token in zip(several, tokens, strict=True)])
        tokens = [int(row.argmax()) for row in logits]
    return time.perf_counter() - start


def ours(file: Path, length: int, before: int) -> dict[str, float]:
    """Seconds of the prompt and of decoding, in this process."""
    model = decoder.compile(containers.open(file))
    tokens = [i % 1000 + 100 for i in range(max(length, before))]
    model.sequence(length).append(tokens[:8])  # once before the clock runs
    start = time.perf_counter()
    model.sequence(length).append(tokens[:length])
    prompt = time.perf_counter() - start
    sequence = model.sequence(before + DECODED)
    logits = sequence.append(tokens[:before])
    start = time.perf_counter()
    for _ in range(DECODED):
        logits = sequence.append([int(logits.argmax())])
    return {"prompt": prompt, "decode": time.perf_counter() - start}


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--peers", type=Path, default=ROOT / ".peers")
    p.add_argument("--model", default="smollm2-135m", help="a folder of --models")
    p.add_argument("--types", nargs="*", default=TYPES)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--prompt", type=int, default=PROMPT)
    p.add_argument("--before", type=int, default=BEFORE)
    p.add_argument("--batch", type=int, nargs="*", default=[], help="numbers of sequences that are decoded at once")
    p.add_argument("--one", type=Path, help="one run of ours, in this process")
    args = p.parse_args()
    quiet_libraries()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(batch(args.one, args.batch[0], args.before) if args.batch else
                         ours(args.one, args.prompt, args.before)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    peers, rows = Peers(args.peers.absolute(), args.work.absolute()), []
    source = f16_gguf(args.models / args.model, args.work)
    for name in args.types:
        file = args.work / f"{args.model}-{name}-plain.gguf"
        if not file.exists():
            fewbits.quantize(source, file, name, calibration="none", finish="off")
        job = {"model": str(file), "threads": args.threads, "before": args.before, "decoded": DECODED,
               "found": str(args.work / "speed.json")}
        one = [sys.executable, __file__, "--one", str(file), "--threads", str(args.threads), "--before",
               str(args.before), "--prompt", str(args.prompt)]
        if args.batch:
            rows += [(name, *row) for row in batches(peers, job, one, args.batch, args.rounds)]
        else:
            rows.append((name, *single(peers, job, one, args.prompt, args.rounds)))
        print(*(f"{v:.4g}" if isinstance(v, float) else v for v in rows[-1]), flush=True)
    heads: tuple[str, ...] = ("type", "sequences", "tokens", "llama.cpp", "x")
    if not args.batch:
        heads = ("type", "decode", "llama.cpp", "x", "GB/s", f"prompt {args.prompt}", "llama.cpp", "x")
    show(f"{args.model} on the CPU, {args.threads} thread(s), after {args.before}: tokens a second", heads, rows,
         args.json)


def run(command: list[str]) -> Any:
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def batches(peers: Peers, job: dict[str, Any], one: list[str], counts: list[int],
            rounds: int) -> Iterator[tuple[int, float, float, float]]:
    for count in counts:
        taken, theirs = [], []
        for _ in range(rounds):
            taken.append(run([*one, "--batch", str(count)]))
            peers.run("llama", "peer_llama.py", "batch", job=job | {"sequences": count})
            theirs.append(json.loads(Path(job["found"]).read_text())["decode"])
        got, peer = median(taken), median(theirs)
        yield count, count * DECODED / got, count * DECODED / peer, peer / got


def single(peers: Peers, job: dict[str, Any], one: list[str], prompt: int, rounds: int) -> tuple[float, ...]:
    taken: dict[str, list[float]] = {"decode": [], "prompt": [], "their decode": [], "their prompt": []}
    for _ in range(rounds):
        for what, seconds in run(one).items():
            taken[what].append(seconds)
        peers.run("llama", "peer_llama.py", "speed", job=job | {"prompt": prompt})
        for what, seconds in json.loads(Path(job["found"]).read_text()).items():
            taken[f"their {what}"].append(seconds)
    decode, first, their_decode, their_first = (median(values) for values in taken.values())
    return (DECODED / decode, DECODED / their_decode, their_decode / decode,
            Path(job["model"]).stat().st_size * DECODED / decode / 1e9,
            prompt / first, prompt / their_first, their_first / first)


if __name__ == "__main__":
    main()
