"""QLoRA on SmolLM2-135M, 512 tokens a step: loss curves, steps a second, peak memory; beside peft + bitsandbytes on the
same nf4 codes, and beside an unquantized LoRA.

Every contender is a process of its own; they take turns of a few steps. All begin with the same adapter and see the
same texts in the same order. "another seed" begins with another adapter: how far its curve is from the first says what
a difference means. Contenders that are only timed run `--short` steps.

    python benchmarks/finetune.py --models .models --steps 200
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ROOT, parser, show

LENGTH, RATE, WARM_UP = 512, 2e-4, 0.03
WINDOW = 20  # steps that a smooth curve averages over
PEER = Path(__file__).with_name("peer_finetune.py")
# name -> (who trains, the model, type of activations, seed of the adapter, whether all steps are run)
CONTENDERS: dict[str, tuple[str, str, str, int, bool]] = {
    "fewbits nf4": ("fewbits", "nf4", "float32", 0, True),
    "fewbits nf4, another seed": ("fewbits", "nf4", "float32", 1, True),
    "bitsandbytes nf4, bfloat16": ("bnb", "nf4", "bfloat16", 0, True),
    "bitsandbytes nf4, float32": ("bnb", "nf4", "float32", 0, False),
    "nf4 decoded, peft alone, float32": ("plain", "decoded", "float32", 0, True),
    "unquantized, bfloat16": ("plain", "original", "bfloat16", 0, False),
    "unquantized, float32": ("plain", "original", "float32", 0, False),
    "fewbits GPTQ int4-g64": ("fewbits", "gptq", "float32", 0, False),
    "fewbits GGUF Q4_K_M": ("fewbits", "gguf", "float32", 0, False),
}


@dataclass
class Contender:
    name: str
    steps: int
    process: subprocess.Popen[str]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    def turn(self) -> bool:
        """Let it go on until it waits again; False when it is done."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.waits()

    def waits(self) -> bool:
        """Read what it says until it waits for its turn; False at its end."""
        assert self.process.stdout
        for line in self.process.stdout:
            if not line.startswith("{"):
                continue
            said = json.loads(line)
            if "turn" in said:
                return True
            self.seconds += [said["seconds"]] if "seconds" in said else []
            self.losses = said.get("losses", self.losses)
            self.memory = said if "resident" in said else self.memory
        if self.process.wait():
            raise SystemExit(f"{self.name} failed: {self.process.returncode}")
        return False


# what all begin with ------------------------------------------------------------------------------------------------
def make(args: Any) -> dict[str, Path]:
    """The bases, the text and the adapters to begin from; what is there already is taken."""
    import fewbits
    from fewbits.finetuning.adapters import Lora, attach, save
    from fewbits.finetuning.data import examples
    from fewbits.loading import load, tokenizer

    original = args.models / "smollm2-135m"
    text = args.shared / "data" / "text"
    made = {"original": original, "nf4": args.work / "finetune-nf4", "gptq": args.work / "finetune-int4-g64",
            "gguf": args.work / "finetune-Q4_K_M.gguf", "decoded": args.work / "finetune-nf4-decoded",
            "tokens": args.work / "finetune-tokens.safetensors"}
    for name, to, more in (("nf4", "nf4", {"calibration": "none"}), ("gguf", "Q4_K_M", {"calibration": "none"}),
                           ("gptq", "int4-g64", {"calibration": text / "c4.txt", "samples": 16})):
        if not made[name].exists():
            fewbits.quantize(original, made[name], to, **more)
    if not made["decoded"].exists():
        fewbits.convert(made["nf4"], made["decoded"], "f32")
    if not made["tokens"].exists():
        import torch
        from safetensors.torch import save_file

        net = load(made["nf4"])
        data = examples(text / "wikitext2-train.txt", tokenizer(net), length=LENGTH)
        save_file({"ids": torch.stack([e.input_ids for e in data[:400]])}, made["tokens"])
    for seed in (0, 1):
        made[f"adapter-{seed}"] = args.work / f"finetune-adapter-{seed}"
        if not made[f"adapter-{seed}"].exists():
            import torch

            torch.manual_seed(seed)
            save(attach(load(made["nf4"]), Lora(), None, str(original)), made[f"adapter-{seed}"])
    return made


# one contender ------------------------------------------------------------------------------------------------------
def one(job: dict[str, Any]) -> None:
    """fewbits, in this process: as `fewbits finetune` does, but that it waits for its turns."""
    import tempfile

    import torch
    from peer_finetune import say, wait, watched
    from safetensors.torch import load_file

    from fewbits.finetuning.adapters import Lora, attach
    from fewbits.finetuning.data import Data, Example
    from fewbits.finetuning.loop import Settings, run
    from fewbits.loading import load

    torch.set_num_threads(job["threads"])
    began = 0.0

    def report(what: str, step: int, total: int) -> None:
        nonlocal began
        say(seconds=time.perf_counter() - began)
        if step % job["turn"] == 0 and step < total:
            wait()
        began = time.perf_counter()

    with watched(), tempfile.TemporaryDirectory() as folder:
        net = load(job["model"], dtype=getattr(torch, job["dtype"]))
        tuned = attach(net, Lora(), job["adapter"], job["model"])
        ids = load_file(job["tokens"])["ids"]
        data = Data(tuple(Example(row, row) for row in ids), "text")
        settings = Settings(steps=job["steps"], batch=1, length=LENGTH, rate=job["rate"], warm_up=job["warm_up"],
                            held_out=0, shuffle=False, dtype=job["dtype"], save_every=1e9)
        wait()
        began = time.perf_counter()
        outcome = run(tuned, data, settings, Path(folder), progress=report)
    say(losses=[loss for _, loss in outcome.losses])


def start(name: str, args: Any, made: dict[str, Path]) -> Contender:
    who, base, dtype, seed, whole = CONTENDERS[name]
    steps = args.steps if whole else min(args.short, args.steps)
    job = {"model": str(made[base]), "dtype": dtype, "adapter": str(made[f"adapter-{seed}"]),
           "tokens": str(made["tokens"]), "steps": steps, "rate": RATE, "warm_up": WARM_UP,
           "turn": args.turn, "threads": args.threads}
    file = args.work / f"finetune-{name.replace(' ', '-').replace(',', '')}.json"
    file.write_text(json.dumps(job))
    python = ROOT / ".peers" / "bnb" / "bin" / "python" if who == "bnb" else sys.executable
    command = [sys.executable, __file__, "--one", file] if who == "fewbits" else [python, PEER, file]
    log = open(file.with_suffix(".log"), "w")  # noqa: SIM115  # lives as long as the process
    return Contender(name, steps, subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE,
                                                   stdout=subprocess.PIPE, stderr=log, text=True))


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--short", type=int, default=30, help="steps of contenders that are only timed")
    p.add_argument("--turn", type=int, default=5, help="steps until the next has its turn")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--only", nargs="*", help="contenders whose names hold one of these")
    p.add_argument("--one", type=Path, help="one contender of fewbits, in this process")
    args = p.parse_args()
    if args.one:
        one(json.loads(args.one.read_text()))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    made = make(args)
    names = [n for n in CONTENDERS if not args.only or any(part in n for part in args.only)]
    contenders = [start(name, args, made) for name in names]
    going = [c for c in contenders if c.waits()]
    while going:
        going = [c for c in going if c.turn()]
        print("; ".join(f"{c.name}: {len(c.seconds)}" for c in going), file=sys.stderr, flush=True)
    rows = [[c.name, c.steps, 1 / statistics.median(c.seconds[1:]), c.memory["anonymous"] / 2**20,
             c.memory["resident"] / 2**20, statistics.fmean(c.losses[-WINDOW:])] for c in contenders]
    show(f"LoRA on SmolLM2-135M, {LENGTH} tokens a step, {args.threads} thread", [
        "trained by", "steps", "steps/s (median)", "peak anonymous MiB", "peak resident MiB",
        f"loss, mean of the last {WINDOW}"], rows, args.json)
    curves = {c.name: c.losses for c in contenders if CONTENDERS[c.name][-1]}
    if curves:
        compare(curves)
        plot(curves, args.work / "finetune-losses.png")
    (args.work / "finetune-losses.json").write_text(json.dumps({c.name: c.losses for c in contenders}))


def smooth(losses: list[float]) -> list[float]:
    """Means of `WINDOW` steps."""
    return [statistics.fmean(losses[at:at + WINDOW]) for at in range(len(losses) - WINDOW + 1)]


def compare(curves: dict[str, list[float]]) -> None:
    """How far the smooth curves lie from the first contender's, at most and in the mean."""
    first, *others = curves
    for name in others:
        gaps = [a - b for a, b in zip(smooth(curves[name]), smooth(curves[first]), strict=True)]
        if gaps:
            print(f"{name} from {first}: at most {max(map(abs, gaps)):.4f}, in the mean {statistics.fmean(gaps):+.4f}")


def plot(curves: dict[str, list[float]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps")
    for (name, losses), style in zip(curves.items(), ("-", ":", "--"), strict=False):
        axes.plot(range(WINDOW, len(losses) + 1), smooth(losses), style, label=name)
    axes.legend(frameon=False)
    figure.savefig(file)
    print(f"curves: {file}")


if __name__ == "__main__":
    main()
