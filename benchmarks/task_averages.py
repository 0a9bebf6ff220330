"""Accuracy on eight tasks before and after quantization, with what changed question by question.

    python benchmarks/task_averages.py [--model smollm2-135m] [--limit 200] [--to int8 nf4 int4-g64 Q4_K_M]    # resumes
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import parser, show

import fewbits
from fewbits.cli.common import progress, quiet_libraries
from fewbits.measure import tasks
from fewbits.measure.tasks.local import FILES
from fewbits.measure.tasks.paired import TaskResult

CALIBRATED = {"solver": "gptq", "samples": 32, "length": 512}
OPTIONS: dict[str, dict[str, Any]] = {  # as people use them: bitsandbytes' types round to the nearest
    "int8": {"solver": "nearest", "calibration": "none"}, "nf4": {"solver": "nearest", "calibration": "none"}}
NORMED = {"arc_easy", "arc_challenge", "hellaswag", "piqa"}  # reported by acc_norm


def quantized(source: Path, to: str, args: Any, report: Any) -> Path:
    """The file of a recipe, made if it isn't there."""
    options = OPTIONS.get(to, CALIBRATED | {"calibration": args.shared / "data" / "text" / "c4.txt"})
    out = args.work / f"{source.name}-{to}-tasks"
    if not out.exists():
        fewbits.quantize(source, out, to, **options, finish="off", progress=report)
    return out


def wanted(found: list[TaskResult]) -> list[TaskResult]:
    """One metric a task."""
    return [r for r in found if r.metric == ("acc_norm" if r.task in NORMED else "acc")]


def average(found: list[TaskResult], field: str, error: str) -> tuple[float, float]:
    """Of the tasks' figures, and its standard error: the tasks are apart."""
    n = len(found)
    return (sum(getattr(r, field) for r in found) / n, sum(getattr(r, error) ** 2 for r in found) ** 0.5 / n)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--limit", type=int, default=200)
    p.add_argument("--to", nargs="*", default=["int8", "nf4", "int4-g64", "Q4_K_M"])
    p.add_argument("--only", nargs="*", default=list(FILES), choices=list(FILES), help="tasks")
    args = p.parse_args()
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    source, rows, shifts = args.models / args.model, [], []
    with progress() as report:
        for to in ["", *args.to]:
            path = quantized(source, to, args, report) if to else source
            found = wanted(tasks.run(path, source, names=args.only, folder=args.shared / "data" / "tasks",
                                     limit=args.limit, progress=report))
            whole, change = average(found, "accuracy", "error"), average(found, "difference", "difference_error")
            rows.append([to or "original", *(f"{100 * r.accuracy:.1f}" for r in found), _percent(whole),
                         _percent(change, "+") if to else ""])
            if to:
                shifts += [[to, r.task, r.metric, _percent((r.difference or 0, r.difference_error or 0), "+"),
                            r.flipped, r.right_to_wrong, r.wrong_to_right,
                            f"{r.log_probability_shift:+.3f} ± {r.log_probability_shift_error:.3f}"] for r in found]
    show(f"{args.model}: accuracy, %, {args.limit} questions a task",
         ["format", *args.only, "average", "less the original's"], rows, args.json)
    show("Question by question, beside the original",
         ["format", "task", "metric", "accuracy", "other answers", "right to wrong", "wrong to right",
          "log-probability of the right one"], shifts)


def _percent(found: tuple[float, float], sign: str = "") -> str:
    return f"{100 * found[0]:{sign}.1f} ± {100 * found[1]:.1f}"


if __name__ == "__main__":
    main()
