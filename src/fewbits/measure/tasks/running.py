"""Ask a model, and its reference, the questions of some tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fewbits
from fewbits import caching, containers, hub, instructions
from fewbits.checkpoint import Checkpoint
from fewbits.measure.circumstances import circumstances, identity
from fewbits.measure.tasks import needs
from fewbits.measure.tasks.answers import Answers
from fewbits.measure.tasks.endings import Likelihood
from fewbits.measure.tasks.paired import Answered, TaskResult, result
from fewbits.runtime import engine

if TYPE_CHECKING:
    from fewbits.measure.tasks.questions import Question

Model = str | Path | Checkpoint | Any
Progress = Callable[[str, int, int], None]


def run(model: Model, against: Model | None = None, *, names: Sequence[str], folder: str | Path | None = None,
        limit: int | None = None, seed: int | None = None, kernel: str | None = None, device: str | None = None,
        fresh: bool = False, progress: Progress | None = None) -> list[TaskResult]:
    """Accuracy of `model` on tasks of lm-evaluation-harness by name, and what changed from `against`: a result for
    every task and metric.

    Questions come from the hub, or from files in `folder`; of each task the first `limit`, or so many drawn by `seed`.
    Answers are kept in the user's cache by the model's content and the question, and taken from there unless `fresh`.

    Raises:
        FewbitsError: no such task, a file that is missing or wrong, no hub; lm-evaluation-harness is not installed;
            logits that are not finite.
    """
    needs.installed()
    needs.quiet()
    from fewbits.measure.tasks.questions import questions

    asked = {name: questions(name, folder, limit, seed) for name in names}
    models = [_opened(m) for m in ((model,) if against is None else (model, against))]
    everything = [q for some in asked.values() for q in some]
    found = [ask(m, everything, kernel, fresh, progress, device) for m in models]
    told = circumstances(*(_checkpoint(m) for m in models), kernel=kernel, device=device, limit=limit, seed=seed,
                         task_files=None if folder is None else str(folder))
    out = []
    for name, some in asked.items():
        for metric in some[0].scores(found[0][some[0].key]):
            sides = [[Answered(q.scores(f[q.key])[metric], q.choice(metric, f[q.key]), q.right(f[q.key]))
                      for q in some] for f in found]
            out.append(result(name, metric, sides[0], sides[1] if len(sides) > 1 else None, told))
    return out


def ask(model: Checkpoint | Any, asked: Sequence[Question], kernel: str | None = None, fresh: bool = False,
        progress: Progress | None = None, device: str | None = None) -> dict[str, list[Likelihood]]:
    """Likelihoods of the endings of every question, by its key."""
    answers = Answers(_file(model, kernel, device))
    missing = list({q.key: q for q in asked if fresh or q.key not in answers}.values())
    if missing:
        from fewbits.measure.tasks.harness import FewbitsLM

        lm = FewbitsLM(model, kernel, on=device)
        for i, question in enumerate(missing):
            answers.put(question.key, lm.likelihoods(question.pairs))
            if progress:
                name = Path(lm.checkpoint.path).name
                progress(f"asking {name}: {question.task.task_name}", i + 1, len(missing))
    return {q.key: answers[q.key] for q in asked}


def _opened(model: Model) -> Checkpoint | Any:
    return containers.open(hub.locate(model)) if isinstance(model, (str, Path)) else model


def _checkpoint(model: Checkpoint | Any) -> Checkpoint:
    from fewbits.loading import checkpoint_of

    return model if isinstance(model, Checkpoint) else checkpoint_of(model)


def _file(model: Checkpoint | Any, kernel: str | None, device: str | None) -> Path | None:
    """Where its answers are kept: nowhere if it is loaded, when only its owner knows what it is."""
    known = identity(model)["sha256"] if isinstance(model, Checkpoint) else None
    if known is None:
        return None
    gpu = engine.device(device)
    how = kernel or "default" if gpu is None else f"{kernel or 'default'}-{gpu.type}"
    computed = f"{how}-{instructions.current()}-{fewbits.__version__}"
    return caching.folder("answers") / f"{known[:32]}-{computed}.jsonl"
