"""Questions of lm-evaluation-harness's tasks: its prompts, its choices, its scores."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import OfflineModeIsEnabled
from lm_eval import tasks
from lm_eval.api.metrics import mean

from fewbits.errors import FewbitsError
from fewbits.measure.tasks import local
from fewbits.measure.tasks.endings import Likelihood

FOLDERS = ("arc", "hellaswag", "mmlu/default", "truthfulqa", "piqa", "winogrande")  # of the tasks with local files
SUBJECT = "mmlu_"
LENGTHS = {"acc_norm": len, "acc_bytes": lambda text: len(text.encode())}  # what a choice's likelihood is divided by
SEVERAL = {"truthfulqa_mc2": lambda document: [i for i, label in enumerate(document["mc2_targets"]["labels"]) if label]}


@dataclass(frozen=True)
class Question:
    """One document of a task, and what a model is asked about it."""

    task: Any  # the harness's
    number: int
    document: dict[str, Any]
    pairs: tuple[tuple[str, str], ...]  # context and ending of each choice

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.pairs).encode()).hexdigest()[:32]

    @property
    def gold(self) -> list[int]:
        """The choices that are right."""
        if self.task.task_name in SEVERAL:
            return SEVERAL[self.task.task_name](self.document)
        target = self.task.doc_to_text(self.document) if self.task.multiple_input else \
            self.task.doc_to_target(self.document)
        if isinstance(target, str):
            return [self.task.doc_to_choice(self.document).index(target)]
        return list(target) if isinstance(target, list) else [target]

    def scores(self, found: Sequence[Likelihood]) -> dict[str, float]:
        """By metric: 1 where the answer is right, 0 where it is wrong, between them where the task has shares."""
        means = [name for name, how in self.task.aggregation().items() if how is mean]
        scored = self.task.process_results(self.document, found)
        return {name: float(scored[name]) for name in means if name in scored}

    def choice(self, metric: str, found: Sequence[Likelihood]) -> int:
        """What the model takes."""
        values = np.array([one for one, _ in found])
        if metric in LENGTHS:
            values /= [LENGTHS[metric](text) for text in self.task.doc_to_choice(self.document)]
        return int(values.argmax())

    def right(self, found: Sequence[Likelihood]) -> float:
        """The logarithm of the probability of what is right."""
        return float(np.logaddexp.reduce([found[i][0] for i in self.gold]))


def questions(name: str, folder: str | Path | None = None, limit: int | None = None,
              seed: int | None = None) -> list[Question]:
    """Of a task or group of tasks by its name there, with local files in `folder` or else those of the hub.

    The first `limit` ones, as there; of a group the first ones of each task, in turn. A `seed` draws them instead.

    Raises:
        FewbitsError: no such task, or not one of choices; a file that is missing or wrong; no hub.
    """
    members = _local(name, folder) if folder is not None else _hub(name)
    for task in members:
        if task.OUTPUT_TYPE != "multiple_choice":
            raise FewbitsError(f"task {task.task_name}: {task.OUTPUT_TYPE}, not a choice between endings",
                               f"python -m fewbits.measure.tasks run --model fewbits --tasks {task.task_name} …")
        task.set_fewshot_seed(1234)  # the harness's own
    documents = [task.eval_docs for task in members]
    places = [(which, i) for which, some in enumerate(documents) for i in range(len(some))]
    if seed is None:
        places.sort(key=lambda place: place[1])
    elif limit is not None:
        places = random.Random(seed).sample(places, min(limit, len(places)))
    return [_question(members[which], i, documents[which][i]) for which, i in places[:limit]]


def _question(task: Any, number: int, document: dict[str, Any]) -> Question:
    context = task.fewshot_context(document, num_fewshot=task.config.num_fewshot or 0)
    asked = task.construct_requests(doc=document, ctx=context, metadata=(task.task_name, number, 1))
    return Question(task, number, document, tuple(request.args for request in asked))


def _known() -> Any:
    """Of the harness's fifteen thousand definitions those of the tasks with local files: all of them take seconds."""
    root = Path(tasks.__file__).parent
    return tasks.TaskManager(include_defaults=False, include_path=[root / f for f in FOLDERS])


def _local(name: str, folder: str | Path) -> list[Any]:
    manager = _known()
    if name != "mmlu" and not name.startswith(SUBJECT):
        return [_with(manager, name, local.documents(name, folder))]
    subjects: dict[str, list[Any]] = {}
    for document in local.documents("mmlu", folder):
        subjects.setdefault(SUBJECT + document["subject"], []).append(document)
    wanted = list(subjects) if name == "mmlu" else [name]
    for one in wanted:
        if one not in subjects or one not in manager.all_subtasks:
            raise FewbitsError(f"task {one}: {'no questions' if one in manager.all_subtasks else 'no such subject'}",
                               "subjects: " + ", ".join(s.removeprefix(SUBJECT) for s in subjects))
    return [_with(manager, one, subjects[one]) for one in wanted]


def _with(manager: Any, name: str, documents: list[Any]) -> Any:
    """The harness's task on other documents."""
    replaced = {"task": name, "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
                "training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": None}
    return manager.load([{"group": "local", "task": [replaced]}])["tasks"][name]


def _hub(name: str) -> list[Any]:
    manager = _known()
    if name not in manager.all_tasks:
        manager = tasks.TaskManager()
    if name not in manager.all_tasks:
        raise FewbitsError(f"lm-evaluation-harness has no task {name!r}", "python -m fewbits.measure.tasks ls tasks")
    try:
        return list(manager.load([name])["tasks"].values())
    except (DatasetNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise FewbitsError(f"task {name}: {str(error).splitlines()[0]}",
                           "--task-files takes questions from files on disk") from error
