"""Multiple choice as in lm-evaluation-harness: the ending of the largest log-likelihood is the model's answer.

A question's context and its endings go through the model in one pass: an ending sees the context and itself, and its
positions follow the context's. So nothing is padded and the context is computed once.

    python benchmarks/tasks.py MODEL [--questions 500]
"""

from __future__ import annotations

import bz2
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import parser, show

import fewbits
from fewbits.cli.common import quiet_libraries
from fewbits.loading import tokenizer as tokenizer_of

SEED = 1234  # which questions


@dataclass(frozen=True)
class Question:
    context: str
    endings: tuple[str, ...]  # each begins with the space that parts it from the context
    gold: int


def arc_easy(folder: Path) -> list[Question]:
    rows = [json.loads(line) for line in (folder / "arc_easy.jsonl").read_text(encoding="utf-8").splitlines()]
    return [Question(r["query"] + "\nAnswer:", tuple(" " + c for c in r["choices"]), r["gold"]) for r in rows]


def hellaswag(folder: Path) -> list[Question]:
    """Six lines a question; brackets of the source's captions and doubled spaces go, as in the harness."""
    def clean(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    lines = bz2.decompress((folder / "hellaswag_val.txt.bz2").read_bytes()).decode().splitlines()
    return [Question(clean(lines[i]), tuple(" " + clean(x) for x in lines[i + 2:i + 6]), int(lines[i + 1]))
            for i in range(0, len(lines) // 6 * 6, 6)]


TASKS = {"arc_easy": arc_easy, "hellaswag": hellaswag}


def questions(task: str, folder: Path, count: int) -> list[Question]:
    """The same `count` questions every time."""
    everything = TASKS[task](folder)
    return random.Random(SEED).sample(everything, min(count, len(everything)))


def encode(question: Question, tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Tokens of the context and of each ending: those of both together, after as many as the context has alone."""
    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    context = ids(question.context)
    return context, [ids(question.context + ending)[len(context):] for ending in question.endings]


@torch.inference_mode()
def log_likelihoods(net: Any, context: Sequence[int], endings: Sequence[Sequence[int]]) -> list[float]:
    """Summed log-probabilities of each ending after the context."""
    tokens, positions, part = list(context), list(range(len(context))), [0] * len(context)
    for i, ending in enumerate(endings, start=1):
        tokens += ending
        positions += range(len(context), len(context) + len(ending))
        part += [i] * len(ending)
    of = torch.tensor(part)
    size = len(tokens)
    sees = (torch.arange(size)[:, None] >= torch.arange(size)) & ((of[:, None] == of) | (of == 0))
    mask = torch.zeros(size, size).masked_fill(~sees, torch.finfo(torch.float32).min)
    hidden = net.base_model(input_ids=torch.tensor([tokens]), position_ids=torch.tensor([positions]),
                            attention_mask=mask[None, None], use_cache=False).last_hidden_state[0]
    found, at = [], len(context)
    for ending in endings:
        rows = [len(context) - 1, *range(at, at + len(ending) - 1)]  # what predicts each of its tokens
        logits = net.get_output_embeddings()(hidden[rows]).float().log_softmax(-1)
        found.append(float(logits.gather(1, torch.tensor(ending)[:, None]).double().sum()))
        at += len(ending)
    return found


def scores(net: Any, asked: Sequence[Question], progress: Any = None) -> list[list[float]]:
    """Log-likelihoods of every ending of every question."""
    tokenizer = tokenizer_of(net)
    out = []
    for i, question in enumerate(asked):
        out.append(log_likelihoods(net, *encode(question, tokenizer)))
        if progress:
            progress("asking", i + 1, len(asked))
    return out


@dataclass(frozen=True)
class Answers:
    """Shares of `questions`, with the standard error of the first two."""

    questions: int
    accuracy: float
    accuracy_error: float
    accuracy_norm: float  # likelihoods divided by the bytes of the ending
    accuracy_norm_error: float
    agreement: float  # the same answer as the original's
    agreement_norm: float
    shift: float  # mean absolute change of an ending's log-likelihood from the original's


def judge(asked: Sequence[Question], found: list[list[float]], original: list[list[float]]) -> Answers:
    def answers(rows: list[list[float]], norm: bool) -> list[int]:
        per = [[s / len(e[1:].encode()) if norm else s for s, e in zip(row, q.endings, strict=True)]
               for row, q in zip(rows, asked, strict=True)]
        return [row.index(max(row)) for row in per]

    n, share, error, same = len(asked), [], [], []
    for norm in (False, True):
        mine, theirs = answers(found, norm), answers(original, norm)
        right = sum(a == q.gold for a, q in zip(mine, asked, strict=True)) / n
        share.append(right)
        error.append(math.sqrt(right * (1 - right) / (n - 1)))
        same.append(sum(a == b for a, b in zip(mine, theirs, strict=True)) / n)
    moved = [abs(a - b) for x, y in zip(found, original, strict=True) for a, b in zip(x, y, strict=True)]
    return Answers(n, share[0], error[0], share[1], error[1], same[0], same[1], sum(moved) / len(moved))


def main() -> None:
    p = parser(__doc__)
    p.add_argument("model", nargs="+", help="the first is the original")
    p.add_argument("--questions", type=int, default=500)
    args = p.parse_args()
    quiet_libraries()
    rows = []
    for task in TASKS:
        asked = questions(task, args.shared / "data" / "tasks", args.questions)
        found = [scores(fewbits.load(model), asked) for model in args.model]
        rows += [[task, model, *list(asdict(judge(asked, f, found[0])).values())[1:]]
                 for model, f in zip(args.model, found, strict=True)]
    show(f"{args.questions} questions", ["task", "model", "acc", "±", "acc_norm", "±", "same answers", "same, norm",
                                         "log-likelihoods moved by"], rows, args.json)


if __name__ == "__main__":
    main()
