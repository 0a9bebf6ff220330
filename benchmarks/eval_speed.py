"""How fast divergence is measured, beside the bare forward pass of the model under test, and in how much memory.

    python benchmarks/eval_speed.py [FILE.gguf …] --against REFERENCE [--chunks 20] [--rounds 3]

Both sides load the model, tokenize and compute logits after every token of the same windows, in turns; one of them also
compares them with the reference's, whose states were kept by a run before. Memory: peak of what no file backs, of a
process each, over short and long text.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, parser, show

from fewbits.measure import evaluate
from fewbits.measure.scoring import scorer, spans
from fewbits.measure.windows import cut, read_text
from fewbits.runtime.build import tokenizer_of

ONE = """
import json, sys
from pathlib import Path
from fewbits.measure import evaluate
job = json.loads(sys.argv[1])
evaluate(job["model"], job["against"], text=job["text"], chunks=job["chunks"])
def status(name):
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
print(json.dumps(status("VmHWM:") / 1024))
"""


def bare(model: str, text: Path, chunks: int) -> float:
    began = time.perf_counter()
    net = scorer(model)
    for window in cut(read_text(text), tokenizer_of(net.checkpoint), 512, chunks, str(text), None):
        for _ in net.logits(window, spans(0, 511)):
            pass
    return time.perf_counter() - began


def measured(model: str, against: str, text: Path, chunks: int) -> float:
    began = time.perf_counter()
    evaluate(model, against, text=text, chunks=chunks)
    return time.perf_counter() - began


def peak(model: str, against: str, text: Path, chunks: int) -> float:
    job = json.dumps({"model": model, "against": against, "text": str(text), "chunks": chunks})
    return float(subprocess.run([sys.executable, "-c", ONE, job], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("files", nargs="*", default=[str(ROOT / "demo-output/bench/smollm2-135m-Q4_K_M-plain.gguf")])
    p.add_argument("--against", required=True)
    p.add_argument("--chunks", type=int, default=20)
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args()
    text, rows = args.shared / "data/text/wikitext2-test.txt", []
    for file in args.files:
        measured(file, args.against, text, args.chunks)
        pairs = [(bare(file, text, args.chunks), measured(file, args.against, text, args.chunks))
                 for _ in range(args.rounds)]
        ratios = [one / other for one, other in pairs]
        rows.append((Path(file).name, args.chunks, *(statistics.median(x) for x in zip(*pairs, strict=True)),
                     statistics.median(ratios), *(peak(file, args.against, text, n) for n in (4, args.chunks))))
        print(*rows[-1], flush=True)
    show(f"Divergence from {Path(args.against).name}, beside the bare forward pass", (
        "model", "chunks", "bare, s", "measured, s", "speed, of bare", "resident MiB, 4 chunks", "all chunks"), rows,
        args.json)


if __name__ == "__main__":
    main()
