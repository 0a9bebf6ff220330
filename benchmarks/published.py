"""The tables that quantization papers and model cards print, of every layout beside its own peer.

    python benchmarks/published.py [--kinds nf4 Q4_K_M …] [--threads 2] [--repeats 2] [--limit 300] [--fresh]

Prompts of 512 tokens at batch 1 and 16; 30 tokens after 30, and 512 after 512, with the cache of keys and values and
without it, at both batches. GGUF files beside llama.cpp, bitsandbytes' layouts beside bitsandbytes, GPTQ beside
GPTQModel, float types beside Transformers alone; `fewbits bench` measures both in turns. A work whose repetitions would
take more than `--limit` seconds, by the rates of the prompts and of 30 tokens, has fewer of them; one of which a single
repetition would is left out, and the output says so. Finished rows are kept in published.jsonl of --work and not
measured again, unless with --fresh.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache import Cache
from common import ROOT, parser, show
from made import directory, plain_gguf

from fewbits.cli.common import quiet_libraries
from fewbits.measure.speed import Speed, bench
from fewbits.measure.speed.rows import Work

# in which recipe, beside whom, and the environment that has it
KINDS = {"fp32": ("F32", "transformers", "bnb"), "fp16": ("F16", "transformers", "bnb"),
         "int8": ("int8", "bitsandbytes", "bnb"), "nf4": ("nf4", "bitsandbytes", "bnb"),
         "int4-g64 (GPTQ)": ("int4-g64", "gptqmodel", "gptq"), "Q4_K_M": ("Q4_K_M", "llama.cpp", "llama"),
         "Q8_0": ("Q8_0", "llama.cpp", "llama")}
BATCHES = (1, 16)
PROMPTS = [Work(512, 0, b) for b in BATCHES]
SHORT, LONG = ([Work(n, n, b, cache) for b in BATCHES for cache in (True, False)] for n in (30, 512))
Row = dict[str, Any]


@dataclass
class Kind:
    """A layout: its file, whom it is beside, and what was found so far."""

    name: str
    file: Path
    peer: str
    python: str
    found: dict[tuple[str, Work], Row]

    def seconds(self, engine: str, work: Work) -> float | None:
        """About what a repetition takes, as far as the works before tell; None if nothing is known."""
        prompt = self._rate(engine, Work(512, 0, work.batch), "prefill") or self._rate(engine, PROMPTS[0], "prefill")
        decode = self._rate(engine, Work(30, 30, work.batch), "decode")
        if prompt is None or (work.cache and work.prompt == LONG[0].prompt and work.generate and decode is None):
            return None
        if not work.cache:
            return work.batch * (work.generate + 1) * (work.prompt + work.generate / 2) / prompt
        return work.batch * work.prompt / prompt + work.batch * work.generate / (decode or prompt)

    def _rate(self, engine: str, work: Work, of: str) -> float | None:
        return self.found.get((engine, work), {}).get(f"{of}_tokens_per_second")


def measured(kind: Kind, works: Sequence[Work], args: argparse.Namespace, kept: Cache) -> None:
    """Adds the rows of some works, those that would take too long as rows with that reason."""
    for work in works:
        able, longest = [], 0.0
        for engine in ("fewbits", kind.peer):
            about = 0.0 if work == PROMPTS[0] else kind.seconds(engine, work)
            if about is None:
                kind.found[engine, work] = {"reason": "how long it would take is not known"}
            elif about > args.limit:
                kind.found[engine, work] = {"reason": f"would take about {about / 60:.1f} minutes a repetition"}
            else:
                able.append(engine)
                longest = max(longest, about)
        if not able:
            continue
        repeats = max(1, min(args.repeats, int(args.limit / max(longest, 1e-9))))
        key = {"kind": kind.name, "file": kind.file.name, "engines": able, "work": str(work), "threads": args.threads,
               "repeats": repeats}
        rows = kept.get(key, lambda work=work, able=able, repeats=repeats: {"rows": [  # type: ignore[misc]
            row.to_json() for row in run(kind, work, able, args.threads, repeats)]})["rows"]
        for row in rows:
            kind.found[row["engine"], work] = row
            print(kind.name, row["engine"], work, row["reason"] or {
                k: f"{v:.4g}" for k, v in row.items() if k.endswith("_second") and v}, flush=True)


def run(kind: Kind, work: Work, engines: Sequence[str], threads: int, repeats: int) -> list[Speed]:
    peers = {kind.peer: kind.python} if kind.peer in engines else {}
    found = bench(kind.file, prompts=[work.prompt], generate=[work.generate], batches=[work.batch], cache=[work.cache],
                  repeats=repeats, threads=threads, peers=peers)
    return [row for row in found if row.engine in engines]


def kinds(args: argparse.Namespace) -> list[Kind]:
    model, found = args.models / args.model, []
    for name in args.kinds:
        recipe, peer, environment = KINDS[name]
        make = plain_gguf if peer == "llama.cpp" else directory
        found.append(Kind(name, make(model, args.work, recipe), peer,
                          str(args.peers.absolute() / environment / "bin" / "python"), {}))
    return found


def table(title: str, kinds: Sequence[Kind], columns: dict[str, Work], figure: str, scale: float = 1.0) -> None:
    rows = []
    for kind in kinds:
        cells: list[Any] = [kind.name, kind.peer]
        for work in columns.values():
            ours, theirs = (kind.found[engine, work].get(figure) for engine in ("fewbits", kind.peer))
            cells += ["-" if v is None else v * scale for v in (ours, theirs)]
            cells.append(ours / theirs if ours and theirs else "-")
        rows.append(cells)
    show(title, ["weights", "beside", *(head for name in columns for head in (name, "beside", "x"))], rows)


def left_out(kinds: Sequence[Kind]) -> None:
    print("\nNot measured:")
    for kind in kinds:
        for (engine, work), row in kind.found.items():
            if row["reason"]:
                print(f"* {kind.name}, {engine}, {work}: {row['reason']}")


def named(works: Sequence[Work]) -> dict[str, Work]:
    return {f"batch {w.batch}" + ("" if w.cache else ", no cache"): w for w in works}


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--peers", type=Path, default=ROOT / ".peers")
    p.add_argument("--model", default="smollm2-135m", help="a folder of --models")
    p.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--limit", type=float, default=300, help="seconds that the repetitions of a row may take")
    p.add_argument("--fresh", action="store_true", help="measure again what was measured")
    args = p.parse_args()
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    kept, made = Cache(args.work / "published.jsonl"), kinds(args)
    if args.fresh:
        kept.forget(lambda key: True)
    for kind in made:
        for works in (PROMPTS, SHORT, LONG):
            measured(kind, works, args, kept)
    table("Prompts of 512 tokens: tokens a second", made, named(PROMPTS), "prefill_tokens_per_second")
    for n, works in ((30, SHORT), (512, LONG)):
        table(f"{n} tokens after {n}: tokens a second", made, named(works), "decode_tokens_per_second")
    sizes = {"30 after 30": SHORT[0], "512 after 512": LONG[0], "batch 16": LONG[2]}
    table("Resident memory, MiB at most", made, sizes, "resident_bytes", 2**-20)
    table("Seconds to load", made, {"fewbits": PROMPTS[0]}, "load_seconds")
    left_out(made)


if __name__ == "__main__":
    main()
