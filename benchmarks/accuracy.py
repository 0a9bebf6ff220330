"""Calibrated quantization beside the peers: the same model, the same calibration tokens, the same measured text.

Calibrated on c4 (32 x 512 tokens), measured on wikitext2-test (8 x 512): mean KL from the original, top-1 agreement,
perplexity, bytes, seconds. Figures beside a peer are ratios, ours divided by theirs.

    python benchmarks/accuracy.py --part gptq gguf          # resumes: what was made and measured is in --work
    python benchmarks/accuracy.py --part all --quick        # every part, tried in minutes on very little
    python benchmarks/accuracy.py --forget gptq quick       # after a change: these are made anew

Parts: baselines (the peers alone), gptq (beside gptqmodel), groups (what group size and act-order cost), gguf (beside
llama.cpp), shares (of fit, feedback, finishing), nf4, self, texts (other kinds of text), tasks, llama-kl (KL inside
llama.cpp and transformers), time (beside gptqmodel, in turn), big (1.1 B), resume (killed and run again).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import runs
from artifacts import FINISHED, OURS, Bench, is_peer
from common import ROOT, parser, show

from fewbits.cli.common import progress, quiet_libraries
from fewbits.measure import tasks

WIDE, BASE = "smollm2-135m-wide", "smollm2-135m"
# group 128 divides the wide model's width only; both have the same function
GPTQ = [(WIDE, f"int{b}-g128") for b in (4, 3, 2)] + [(BASE, f"int{b}-{g}") for g in ("g32", "row") for b in (4, 3, 2)]
MIXES = ["Q2_K", "Q3_K_S", "Q3_K_M", "Q4_0", "Q4_K_S", "Q4_K_M"]
GPTQMODEL_BEST = ("best",)
THEIR_BEST = ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_XS", "IQ4_NL"]
PURE = ["pure:Q2_K", "pure:Q3_K", "pure:Q4_K", "pure:Q4_0"]
TASKS, SEED = ("arc_easy", "hellaswag"), 1234  # which questions
STAGES = ("gptq", "quick")  # without finishing, and with
GOALS = {"int4": (0.95, 0.75), "int3": (0.95, 0.75), "int2": (0.8, 0.5), "Q2_K": (1, 0.6), "Q3_K_M": (1, 0.6),
         "Q4_0": (1, 0.8), "Q4_K_S": (1, 0.8), "Q4_K_M": (1, 0.8)}  # of the ratio: without finishing, and with


class Report:
    """The tables of one call, and what could not be run."""

    def __init__(self, bench: Bench, args: Any):
        self.bench, self.args = bench, args
        self.tables: list[dict[str, Any]] = []

    def first(self, rows: Sequence[Any]) -> list[Any]:
        """All of them; the first alone with --quick, and with --only those whose recipe is named."""
        kept = [r for r in rows if not self.args.only or (r[1] if isinstance(r, tuple) else r) in self.args.only]
        return kept[:1] if self.args.quick else kept

    def methods(self, wanted: Sequence[str]) -> list[str]:
        """Those that --methods does not leave out."""
        return [m for m in wanted if not self.args.methods or m in self.args.methods or is_peer(m)]

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        show(title, header, rows)
        self.tables.append({"title": title, "header": list(header), "rows": [list(r) for r in rows]})

    @property
    def setting(self) -> str:
        return f"c4 {self.bench.samples} x 512, wikitext2-test {self.bench.chunks} x 512"


def ratio(a: float, b: float) -> str:
    return f"{a / b:.3f}"


def percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def figures(row: dict[str, Any]) -> list[Any]:
    return [f"{row['kl_mean']:.4f}", percent(row["top1"]), f"{row['perplexity']:.2f}", f"{row['bytes'] / 1e6:.2f}",
            f"{row['seconds']:.0f}"]


FIGURES = ["KL", "top-1", "perplexity", "MB", "s"]


def beside(r: Report, title: str, recipes: Sequence[tuple[str, str]], rivals: Sequence[str]) -> None:
    """One table of what everybody reached, one of ratios of KL with the goals."""
    all_rows, ratios = [], []
    ours = r.methods(STAGES)
    for model, to in recipes:
        found = {m: r.bench.measured(model, to, m) for m in [*ours, *rivals]}
        all_rows += [[model, to, m, *figures(row)] for m, row in found.items()]
        goal = GOALS.get(to.split("-")[0], ("", ""))
        for rival in rivals:
            theirs = found[rival]
            ratios.append([model, to, rival, ratio(found[ours[0]]["bytes"], theirs["bytes"]) if ours else "",
                           *(ratio(found[m]["kl_mean"], theirs["kl_mean"]) for m in ours), *map(str, goal)])
    r.table(f"{title}: {r.setting}", ["model", "recipe", "method", *FIGURES], all_rows)
    r.table(f"{title}: KL ours / theirs", ["model", "recipe", "beside", "bytes", *ours, "goal", "goal, finished"],
            ratios)


def part_baselines(r: Report) -> None:
    files = [(WIDE, to, "llama.cpp") for to in [*MIXES, *THEIR_BEST, *PURE]]
    files += [(model, to, "gptqmodel-default") for model, to in GPTQ]
    files += [(WIDE, to, f"gptqmodel-{s}") for _, to in GPTQ[:3] for s in GPTQMODEL_BEST]
    rows = [[*file, *figures(r.bench.measured(*file))] for file in r.first(files)]
    r.table(f"The peers: {r.setting}", ["model", "recipe", "method", *FIGURES], rows)


def part_gptq(r: Report) -> None:
    beside(r, "GPTQ checkpoints", r.first(GPTQ), ["gptqmodel-default"])
    beside(r, "GPTQ checkpoints at gptqmodel's best settings", r.first(GPTQ[:3]),
           [f"gptqmodel-{s}" for s in GPTQMODEL_BEST])


def part_groups(r: Report) -> None:
    rows = []
    for bits in r.first([4, 3, 2]):
        for group in ("g32", "g64", "g192", "row", "g32-asym", "g64-asym"):
            to = f"int{bits}-{group}"
            for method in r.methods(("gptq", "act-order")):
                rows.append([to, method, *figures(r.bench.measured(BASE, to, method))])
    r.table(f"Group size and act-order on {BASE}, without finishing: {r.setting}", ["recipe", "method", *FIGURES], rows)


def part_gguf(r: Report) -> None:
    mixes = r.first([(WIDE, m) for m in MIXES])
    beside(r, "GGUF beside llama-quantize with importances", mixes, ["llama.cpp"])
    theirs = {to: r.bench.measured(WIDE, to, "llama.cpp")
              for to in [*(m for _, m in mixes), *(THEIR_BEST[:1] if r.args.quick else THEIR_BEST)]}
    r.table(f"All of llama.cpp's files: {r.setting}", ["type", *FIGURES], [[t, *figures(f)] for t, f in theirs.items()])
    rows = []
    for _, to in mixes:
        for method in r.methods(STAGES):
            mine = r.bench.measured(WIDE, to, method)
            rival = min((t for t, f in theirs.items() if f["bytes"] <= mine["bytes"] * 1.001),
                        key=lambda t: theirs[t]["kl_mean"], default=None)
            if rival:
                rows.append([to, method, f"{mine['bytes'] / 1e6:.2f}", rival, f"{theirs[rival]['bytes'] / 1e6:.2f}",
                             ratio(mine["kl_mean"], theirs[rival]["kl_mean"])])
    r.table("Beside llama.cpp's best file of at most as many bytes: KL ours / theirs",
            ["ours", "method", "MB", "theirs", "MB", "ratio"], rows)
    beside(r, "Pure types, embedding in 16 bits", r.first([(WIDE, t) for t in PURE]), ["llama.cpp", "llama.cpp-plain"])


def part_shares(r: Report) -> None:
    steps = r.methods(("nearest", "search", "weighted", "awq", "gptq", "awq+gptq", "act-order", *STAGES[1:]))
    rows = []
    for model, to in r.first([(WIDE, m) for m in MIXES] + GPTQ[:3]):
        able = [m for m in steps if m != "act-order" or to.startswith("int")]
        found = {m: r.bench.measured(model, to, m)["kl_mean"] for m in able}
        rows.append([to, *(f"{found[m]:.4f}" if m in found else "–" for m in steps)])
    r.table(f"KL by step, each on top of the one before but awq: {r.setting}", ["recipe", *steps], rows)


def part_nf4(r: Report) -> None:
    rows = []
    for to in r.first(["nf4", "nf4-dq", "fp4"]):
        plain = r.bench.measured(BASE, to, "nearest")
        rows.append([to, "nearest", *figures(plain), ""])
        for method in r.methods(("search", *STAGES)):
            mine = r.bench.measured(BASE, to, method)
            rows.append([to, method, *figures(mine), ratio(mine["kl_mean"], plain["kl_mean"])])
    r.table(f"bitsandbytes' types on {BASE}: {r.setting}", ["recipe", "method", *FIGURES, "KL / nearest"], rows)


def part_self(r: Report) -> None:
    rows = []
    for model, to in r.first([(WIDE, "int4-g128"), (WIDE, "int3-g128"), (WIDE, "Q4_K_M"), (WIDE, "Q2_K")]):
        for method in STAGES:
            if len(r.methods((method, f"{method}-self"))) == 2:
                found = [r.bench.measured(model, to, m)["kl_mean"] for m in (method, f"{method}-self")]
                rows.append([to, method, *(f"{x:.4f}" for x in found), ratio(found[1], found[0])])
    r.table("Calibrated on the model's own text beside c4 (goal 1.15): KL",
            ["recipe", "method", "c4", "self", "ratio"], rows)


def part_texts(r: Report) -> None:
    rows = []
    for text in ("wikitext2-test", "tinystories", "code"):
        for to in r.first(["Q2_K", "Q3_K_M", "Q4_K_M"]):
            theirs = r.bench.measured(WIDE, to, "llama.cpp", text)["kl_mean"]
            found = [r.bench.measured(WIDE, to, m, text)["kl_mean"] for m in r.methods(STAGES)]
            rows.append([text, to, f"{theirs:.4f}", *(ratio(x, theirs) for x in found)])
    r.table("Other kinds of text: KL ours / llama.cpp's", ["text", "recipe", "llama.cpp", *r.methods(STAGES)], rows)


def part_tasks(r: Report) -> None:
    count, original, rows = 20 if r.args.quick else 500, r.bench.models / WIDE, []
    made = [(to, method) for to in r.first(["Q2_K", "Q3_K_M", "Q4_K_M"])
            for method in ["llama.cpp", *r.methods(STAGES)]]
    for to, method in [("original", ""), *made]:
        path = r.bench.file(WIDE, to, method)[0] if method else original
        found = tasks.run(path, original, names=TASKS, folder=r.args.shared / "data" / "tasks", limit=count,
                          seed=SEED, kernel="decoded", progress=r.bench.progress)
        rows += [[x.task, x.metric, to, method, f"{100 * x.accuracy:.1f} ± {100 * x.error:.1f} %",
                  f"{100 * x.difference:+.1f} ± {100 * x.difference_error:.1f} %", x.flipped,
                  f"{x.log_probability_shift:+.3f}"] for x in found]
    r.table(f"{count} questions a task", ["task", "metric", "recipe", "method", "accuracy", "less the original's",
                                          "other answers", "log-probability of the right one"], sorted(rows))


def part_llama_kl(r: Report) -> None:
    rows = []
    for to in r.first(["Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M"]):
        for method in ["llama.cpp", *r.methods(STAGES)]:
            weights = r.bench.measured(WIDE, to, method)["kl_mean"]
            key = {"llama-kl": [WIDE, to, method, r.bench.samples], "chunks": r.bench.chunks}
            row = r.bench.cache.get(key, partial(runs.inside_llama, r.bench, WIDE, to, method))
            rows.append([to, method, f"{weights:.4f}", f"{row['rounded']:.4f}", f"{row['inside']:.4f}",
                         *_gap(row["inside"], row["rounded"])])
    r.table("KL inside llama.cpp", ["recipe", "method", "ours, weights only", "ours, activations rounded", "llama.cpp",
                                    "difference", "within 2 % or 0.005"], rows)
    rows = []
    for model, to in r.first([GPTQ[0], GPTQ[3], GPTQ[1]]):
        for method in ["gptqmodel-default", *r.methods(("gptq", "act-order", "quick"))]:
            ours = r.bench.measured(model, to, method)["kl_mean"]
            key = {"transformers-kl": [model, to, method, r.bench.samples], "chunks": r.bench.chunks}
            row = r.bench.cache.get(key, partial(runs.inside_transformers, r.bench, model, to, method))
            rows.append([model, to, method, f"{ours:.4f}", f"{row['inside']:.4f}", *_gap(row["inside"], ours)])
    r.table("KL in transformers with gptqmodel", ["model", "recipe", "method", "ours", "theirs", "difference",
                                                  "within 2 % or 0.005"], rows)


def _gap(theirs: float, ours: float) -> list[str]:
    difference = theirs - ours
    return [f"{difference:+.4f}", "yes" if abs(difference) <= max(0.02 * ours, 0.005) else "**no**"]


def part_time(r: Report) -> None:
    rows = []
    for turn in range(r.args.repetitions):
        ours, theirs = runs.timed_pair(r.bench, WIDE, "int4-g128")
        rows.append([turn + 1, ours["seconds"], theirs["seconds"], ratio(ours["seconds"], theirs["seconds"]),
                     ours["processor_seconds"], theirs["processor_seconds"],
                     ratio(ours["processor_seconds"], theirs["processor_seconds"])])
    r.table(f"int4-g128 of {WIDE} without finishing, c4 {r.bench.samples} x 512: seconds (goal 0.7). Ours with reading "
            "and writing, theirs the call of quantize alone",
            ["turn", "ours", "theirs", "ratio", "ours, CPU", "theirs, CPU", "ratio"], rows)


def part_big(r: Report) -> None:
    rows = []
    for to in r.first(["int4-g128", "Q4_K_M"]):
        row = runs.big(r.bench, to, samples=1 if r.args.quick else 8)
        rows.append([to, row["above"] / 2**20, row["before"] / 2**20, row["seconds"], row["size"] / 1e9])
    r.table("1.1 B random weights, calibrated on 8 x 512 tokens, no finishing",
            ["recipe", "peak anonymous MiB above imports", "imports, MiB", "seconds", "GB"], rows)


def part_resume(r: Report) -> None:
    rows = []
    for model, to in r.first([(BASE, "int4-g32"), (WIDE, "Q4_K_M")]):
        row = runs.killed_and_resumed(r.bench, model, to, samples=2 if r.args.quick else 8)
        rows.append([model, to, row["tensors"], ", ".join(row["differ"]) or "none", row["unbroken"], row["resumed"]])
    r.table("Killed (SIGKILL) and run again, beside an unbroken run",
            ["model", "recipe", "tensors at the kill", "files that differ", "unbroken s", "resumed s"], rows)


PARTS: dict[str, Callable[[Report], None]] = {
    "baselines": part_baselines, "gptq": part_gptq, "groups": part_groups, "gguf": part_gguf, "shares": part_shares,
    "nf4": part_nf4, "self": part_self, "texts": part_texts, "tasks": part_tasks, "llama-kl": part_llama_kl,
    "time": part_time, "big": part_big, "resume": part_resume}


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--part", nargs="*", choices=[*PARTS, "all"], help="all, where none is named")
    p.add_argument("--only", nargs="*", default=[], help="recipes")
    p.add_argument("--methods", nargs="*", default=[], choices=[*OURS, *FINISHED],
                   help="of ours; the peers' always run")
    p.add_argument("--forget", nargs="*", default=[], help="methods to make anew")
    p.add_argument("--samples", type=int, default=32, help="calibration sequences of 512 tokens")
    p.add_argument("--chunks", type=int, default=8, help="windows of 512 tokens that are measured")
    p.add_argument("--repetitions", type=int, default=1, help="pairs of the part time")
    p.add_argument("--peers", type=Path, default=ROOT / ".peers")
    p.add_argument("--quick", action="store_true", help="the first recipe of each part, 4 sequences, 2 windows")
    args = p.parse_args()
    args.work, args.peers = args.work.absolute(), args.peers.absolute()
    if args.quick:
        args.samples, args.chunks = 4, 2
    quiet_libraries()
    with progress() as report:
        r = Report(Bench.of(args, report), args)
        if args.forget:
            r.bench.forget(args.forget)
        parts = args.part or ([] if args.forget else ["all"])
        for name in PARTS if "all" in parts else parts:
            PARTS[name](r)
    if args.json:
        args.json.write_text(json.dumps(r.tables, indent=1))


if __name__ == "__main__":
    main()
