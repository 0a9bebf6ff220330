"""The native decoder beside llama.cpp on the same GGUF files: tokens a second of decoding, and of a prompt.

    python benchmarks/cpu.py [--types Q4_K_M Q8_0 …] [--model smollm2-135m] [--threads 2] [--rounds 3]
    python benchmarks/cpu.py --prompt 4096 --before 4096 --decoded 32      # a long context
    python benchmarks/cpu.py --batch 4 16

Prompt: 512 tokens at once, in a sequence that is empty. Decoding: 128 tokens after 8, one after the other, the most
likely taken; `--batch`: of so many sequences in a call. What decoding reads of the weights in a second is beside the
rate at which memory can be read, taken in the same run. Each side runs in a process of its own, in turns, after a
warm-up; medians of the rounds. llama.cpp keeps its defaults but for the number of threads; it has flash attention on
and off, the better counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from baselines import Peers, f16_gguf
from common import ROOT, parser, show
from kernels import limits

import fewbits
from fewbits import containers
from fewbits.cli.common import quiet_libraries
from fewbits.runtime import decoder

TYPES = ("Q4_0", "Q4_1", "Q4_K_M", "Q5_K_M", "Q8_0", "Q3_K_M", "Q2_K", "IQ4_XS")


def several(job: dict[str, Any]) -> dict[str, float]:
    """Seconds of decoding some sequences at once."""
    model = decoder.compile(containers.open(job["model"]))
    sequences = [model.sequence(job["before"] + job["decoded"]) for _ in range(job["sequences"])]
    for k, sequence in enumerate(sequences):
        sequence.append([100 + k + p for p in range(job["before"])])
    tokens = [1] * len(sequences)
    start = time.perf_counter()
    for _ in range(job["decoded"]):
        logits = model.step([(sequence, [token], 1) for sequence, token in zip(sequences, tokens, strict=True)])
        tokens = [int(row.argmax()) for row in logits]
    return {"decode": time.perf_counter() - start}


def one(job: dict[str, Any]) -> dict[str, float]:
    """Seconds of the prompt and of decoding; GB read in a second."""
    model, length = decoder.compile(containers.open(job["model"])), job["prompt"]
    tokens = [i % 1000 + 100 for i in range(max(length, job["before"]))]
    model.sequence(8).append(tokens[:8])  # once before the clock runs
    start = time.perf_counter()
    model.sequence(length).append(tokens[:length])
    found = {"prompt": time.perf_counter() - start}
    sequence = model.sequence(job["before"] + job["decoded"])
    logits = sequence.append(tokens[:job["before"]])
    start = time.perf_counter()
    for _ in range(job["decoded"]):
        logits = sequence.append([int(logits.argmax())])
    return found | {"decode": time.perf_counter() - start, "read": limits(job["threads"])[0]}


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
    p.add_argument("--batch", type=int, nargs="*", default=[], help="numbers of sequences that are decoded at once")
    p.add_argument("--one", help="one run of ours, in this process: a job as JSON")
    args = p.parse_args()
    quiet_libraries()
    if args.one:
        job = json.loads(args.one)
        torch.set_num_threads(job["threads"])
        print(json.dumps(several(job) if "sequences" in job else one(job)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    peers, rows = Peers(args.peers.absolute(), args.work.absolute()), []
    source = f16_gguf(args.models / args.model, args.work)
    for name in args.types:
        file = args.work / f"{args.model}-{name}-plain.gguf"
        if not file.exists():
            fewbits.quantize(source, file, name, calibration="none", finish="off")
        job = {"model": str(file), "threads": args.threads, "prompt": args.prompt, "before": args.before,
               "decoded": args.decoded, "found": str(args.work / "speed.json")}
        for count in args.batch:
            mine, theirs = paired(peers, "batch", job | {"sequences": count}, args.rounds)
            rows.append((name, count, *rates(count * args.decoded, mine["decode"], theirs["decode"])))
            say(rows[-1])
        if not args.batch:
            mine, theirs = paired(peers, "speed", job, args.rounds)
            read = token_bytes(file) * args.decoded / mine["decode"] / 1e9
            rows.append((name, *rates(args.decoded, mine["decode"], theirs["decode"]), 100 * read / mine["read"],
                         *rates(args.prompt, mine["prompt"], theirs["prompt"])))
            say(rows[-1])
    sides, after = ("llama.cpp", "x"), f"{args.decoded} after {args.before}"
    heads = (("type", "sequences", after, *sides) if args.batch else
             ("type", after, *sides, "% of reading", f"prompt of {args.prompt}", *sides))
    show(f"{args.model} on the CPU, {args.threads} thread(s): tokens a second", heads, rows, args.json)


def say(row: tuple[Any, ...]) -> None:
    print(*(f"{v:.4g}" if isinstance(v, float) else v for v in row), flush=True)


def rates(tokens: int, mine: float, theirs: float) -> tuple[float, float, float]:
    return tokens / mine, tokens / theirs, theirs / mine


def paired(peers: Peers, mode: str, job: dict[str, Any], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of both sides."""
    taken: list[list[dict[str, float]]] = [[], []]
    for _ in range(rounds):
        ran = subprocess.run([sys.executable, __file__, "--one", json.dumps(job)], capture_output=True, text=True,
                             check=True)
        taken[0].append(json.loads(ran.stdout.splitlines()[-1]))
        peers.run("llama", "peer_llama.py", mode, job=job)
        taken[1].append(json.loads(Path(job["found"]).read_text()))
    mine, theirs = ({k: median(found[k] for found in side) for k in side[0]} for side in taken)
    return mine, theirs


if __name__ == "__main__":
    main()
