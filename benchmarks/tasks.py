"""Tasks on fewbits' decoder beside lm-evaluation-harness's own Transformers backend: are the answers the same?

Both are asked the same texts, 0-shot; the harness's backend computes in float32. A table of accuracies, seconds and how
many answers are the same; then every answer that is not, with how near to each other the two endings are there.

    python benchmarks/tasks.py [--model smollm2-135m] [--limit 200] [--only arc_easy piqa]     # resumes
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from cache import Cache
from common import parser, show
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from fewbits.cli.common import progress, quiet_libraries
from fewbits.measure.circumstances import circumstances
from fewbits.measure.tasks import needs
from fewbits.measure.tasks.harness import FewbitsLM
from fewbits.measure.tasks.local import FILES
from fewbits.measure.tasks.paired import mean
from fewbits.measure.tasks.questions import LENGTHS, Question, questions

STEP = 20  # questions that are kept together


class Ours:
    def __init__(self, path: Path):
        self.lm = FewbitsLM(path)

    def ask(self, asked: list[Question]) -> list[list[tuple[float, bool]]]:
        return [self.lm.likelihoods(q.pairs) for q in asked]


class Theirs:
    def __init__(self, path: Path):
        self.lm = HFLM(pretrained=str(path), dtype="float32", device="cpu", batch_size=4)

    def ask(self, asked: list[Question]) -> list[list[tuple[float, bool]]]:
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(p for q in asked for p in q.pairs)]
        found = iter(self.lm.loglikelihood(requests, disable_tqdm=True))
        return [[next(found) for _ in q.pairs] for q in asked]


ENGINES = {"fewbits": Ours, "harness": Theirs}


def answers(engine: str, path: Path, task: str, asked: list[Question], cache: Cache, made: dict[str, Any],
            report: Any) -> tuple[list[list[tuple[float, bool]]], float]:
    """Of one engine, and the seconds they took."""
    found, seconds = [], 0.0
    for at in range(0, len(asked), STEP):
        some = asked[at:at + STEP]

        def ask(some: list[Question] = some) -> dict[str, Any]:
            if engine not in made:
                made[engine] = ENGINES[engine](path)
            began = time.monotonic()
            return {"found": made[engine].ask(some), "seconds": time.monotonic() - began}

        row = cache.get({"engine": engine, "model": path.name, "questions": [q.key for q in some]}, ask)
        found += row["found"]
        seconds += row["seconds"]
        report(f"{engine}: {task}", at + len(some), len(asked))
    return found, seconds


def compare(task: str, asked: list[Question], ours: list[Any], theirs: list[Any],
            seconds: tuple[float, float]) -> tuple[list[list[Any]], list[list[Any]]]:
    """Rows of the table of metrics, and those of the answers that differ."""
    moved = [abs(a[0] - b[0]) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    rows, differing = [], []
    for metric in asked[0].scores(theirs[0]):
        shares = [mean([q.scores(f)[metric] for q, f in zip(asked, found, strict=True)]) for found in (ours, theirs)]
        same = 0
        for q, x, y in zip(asked, ours, theirs, strict=True):
            a, b = q.choice(metric, x), q.choice(metric, y)
            same += a == b
            if a != b:
                differing.append([q.task.task_name, metric, q.number, a, b, _apart(q, metric, y, a, b),
                                  _apart(q, metric, x, b, a)])
        rows.append([task, metric, len(asked), *(f"{100 * m:.1f} ± {100 * e:.1f} %" for m, e in shares), same,
                     max(moved), sum(moved) / len(moved), *seconds])
    return rows, differing


def _apart(q: Question, metric: str, found: list[Any], loser: int, winner: int) -> float:
    """How much more likely the one is than the other, as the metric counts, in nats."""
    length = LENGTHS.get(metric, lambda _: 1)
    choices = q.task.doc_to_choice(q.document)
    return float(found[winner][0] / length(choices[winner]) - found[loser][0] / length(choices[loser]))


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--limit", type=int, default=200)
    p.add_argument("--only", nargs="*", choices=list(FILES), help="tasks")
    args = p.parse_args()
    quiet_libraries()
    needs.quiet()
    path, made = args.models / args.model, dict[str, Any]()
    args.work.mkdir(parents=True, exist_ok=True)
    cache = Cache(args.work / "tasks.jsonl")
    rows, differing = [], []
    with progress() as report:
        for task in args.only or FILES:
            asked = questions(task, args.shared / "data" / "tasks", args.limit)
            both = [answers(engine, path, task, asked, cache, made, report) for engine in ENGINES]
            some, others = compare(task, asked, both[0][0], both[1][0], (both[0][1], both[1][1]))
            rows += some
            differing += others
    print(f"torch: {torch.get_num_threads()} threads; fewbits: {circumstances()['machine']['threads']}")
    show(f"{args.model}: {args.limit} questions a task, 0-shot",
         ["task", "metric", "questions", "fewbits", "harness", "same answers", "log-likelihoods apart, at most, nats",
          "on average", "fewbits s", "harness s"], rows, args.json)
    show("Answers that differ", ["task", "metric", "question", "fewbits", "harness", "the harness's by, nats",
                                 "ours by, nats"], differing)


if __name__ == "__main__":
    main()
