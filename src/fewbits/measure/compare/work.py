"""The measurements of a comparison, one method a kind; what is known already is not measured again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fewbits import containers, planning
from fewbits.checkpoint import Checkpoint
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError
from fewbits.inspection import inspect
from fewbits.measure.circumstances import identity, machine
from fewbits.measure.compare import layers
from fewbits.measure.compare.candidates import finite
from fewbits.measure.compare.cases import Case
from fewbits.measure.compare.settings import Settings, content
from fewbits.recipe import ModelFacts

CONTEXT = 4096  # tokens of context that memory is estimated for
UNIT = 1000  # of progress, for each step
STEPS = 3  # of each case by itself: made, weighed, judged


class Steps:
    """One bar for everything: each step as long as another, what happens inside it a part."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done = progress, total * UNIT, 0

    @contextmanager
    def step(self, name: str) -> Iterator[Progress]:
        reached = 0

        def inside(what: str, done: int, total: int) -> None:
            nonlocal reached
            reached = max(reached, min(UNIT, UNIT * done // max(1, total)))  # a job of several parts never goes back
            self._say(f"{name}, {what}", self.done + reached)

        self._say(name, self.done)
        yield inside
        self.done += UNIT
        self._say(name, self.done)

    def _say(self, what: str, done: int) -> None:
        if self.progress:
            self.progress(f"comparing: {what}", done, self.total)


class Work:
    """Fills the fields of the cases, of which the first is the original."""

    def __init__(self, source: Checkpoint, cases: Sequence[Case], settings: Settings, text: Path,
                 progress: Progress | None):
        self.source, self.cases, self.settings, self.text = source, cases, settings, text
        self.steps = Steps(progress, len(cases) * (STEPS + bool(settings.tasks)) + settings.speed)
        self.original = identity(source)["sha256"]
        facts = ModelFacts.of(source)
        self.beside = planning.kv_bytes(facts, CONTEXT) + planning.working_bytes(facts, CONTEXT)

    def run(self) -> None:
        for case in self.cases:
            self.make(case)
            self.weigh(case)
            self.judge(case)
        if self.settings.tasks:
            for case in self.cases:
                self.ask(case)
        if self.settings.speed:
            self.time()

    def _against(self, case: Case) -> Checkpoint | None:
        return None if case is self.cases[0] else self.source

    def _find(self, case: Case, what: str, key: Any, reason: str, measure: Callable[[Progress], Any]) -> Any:
        """What is kept, or what `measure` finds. None where it cannot be had: why, goes to the field `reason`."""
        with self.steps.step(case.name) as progress:
            if case.failed:
                return None
            try:
                return case.kept.once(what, key, lambda: measure(progress))
            except FewbitsError as error:
                if case is self.cases[0] and reason == "reason":  # without the original there is nothing to compare
                    raise
                case.fields[reason] = str(error)
            except Exception as error:  # hours of other candidates' work shall not end with this one
                case.fields[reason] = f"{type(error).__name__}: {error}"
            return None

    def _file(self, case: Case, progress: Progress) -> Path:
        """The file of a case; made again where it wasn't kept."""
        if case.to and not case.path.exists():
            self._quantize(case, progress)
        return case.path

    # one kind each ----------------------------------------------------------------------------------------------------
    def make(self, case: Case) -> None:
        """The file, and what its header says."""
        if case.to:
            case.key = {"model": self.original, "recipe": [case.to, content(case.to)], **self.settings.making}
            if case.kept.get("making", case.key) is None:
                case.kept.found.pop("made", None)  # a file of other settings, or none
        elif case is self.cases[0]:
            case.key = {"file": self.original}

        def measure(progress: Progress) -> dict[str, Any]:
            told = self._quantize(case, progress) if case.to else {}
            found = inspect(case.path)
            return {"container": found.container, "nbytes": found.nbytes, "bits_per_weight": found.bits_per_weight,
                    "estimated_bytes": found.tensor_bytes + self.beside, **told}

        try:
            case.key = case.key or {"file": identity(containers.open(case.path))["sha256"]}
        except FewbitsError as error:
            case.fields["reason"] = str(error)
        case.fields |= self._find(case, "made", case.key, "reason", measure) or {}

    def _quantize(self, case: Case, progress: Progress) -> dict[str, Any]:
        from fewbits.quantizing import quantize

        if case.path.exists():
            if "making" not in case.kept.found:
                raise FewbitsError(f"{case.path}: exists already, and no comparison made it")
            case.forget()
        case.kept.put("making", case.key, True)
        s = self.settings
        made = quantize(self.source, case.path, case.to, solver=s.solver, calibration=s.calibration,
                        samples=s.samples, seed=s.seed, progress=progress)
        return {"seconds": made.seconds, "calibration": made.calibration, "notes": made.notes}

    def weigh(self, case: Case) -> None:
        """The error of each weight."""
        original = self.original

        def measure(progress: Progress) -> Any:
            return layers.errors(containers.open(self._file(case, progress)), self.source, progress)

        if case is self.cases[0]:
            with self.steps.step(case.name):
                return
        key = {"file": case.key, "original": original}
        case.fields["layers"] = tuple(self._find(case, "layers", key, "layers_reason", measure) or ())

    def judge(self, case: Case) -> None:
        """Quality, on the same tokens for all."""
        from fewbits.measure import evaluate

        s = self.settings
        key = {"file": case.key, "original": self.original, "text": content(str(self.text)), "chunks": s.chunks,
               "context": s.context}

        def measure(progress: Progress) -> Any:
            return evaluate(self._file(case, progress), self._against(case), text=self.text, chunks=s.chunks,
                            context=s.context, progress=progress).to_json()

        case.fields["quality"] = self._find(case, "quality", key, "reason", measure)

    def ask(self, case: Case) -> None:
        """Answers to the questions of tasks."""
        from fewbits.measure import tasks

        s = self.settings
        key = {"file": case.key, "original": self.original, "tasks": s.tasks, "limit": s.limit,
               "files": _listing(s.task_files)}

        def measure(progress: Progress) -> Any:
            found = tasks.run(self._file(case, progress), self._against(case), names=list(s.tasks),
                              folder=s.task_files, limit=s.limit, progress=progress)
            return [one.to_json() for one in found]

        case.fields["tasks"] = tuple(self._find(case, "tasks", key, "tasks_reason", measure) or ())

    def time(self) -> None:
        """Speed of all whose speed isn't known, in turn, so that noise hits all alike."""
        import torch  # noqa: F401  # the machine's graphics processor is known through it

        s = self.settings
        setting = {"prompt": s.prompt, "generate": s.generate, "repeats": s.repeats, "threads": s.threads,
                   "machine": machine()}
        going = [case for case in self.cases if not case.failed]
        for case in going:
            case.fields["speed"] = tuple(case.kept.get("speed", {"file": case.key, **setting}) or ())
        missing = [case for case in going if not case.fields["speed"]]
        with self.steps.step("speed") as progress:
            rows = self._timed(missing, progress) if missing else []
        for case, row in zip(missing, rows, strict=True):
            if finite(row.get("decode_tokens_per_second")):
                case.fields["speed"] = tuple(case.kept.put("speed", {"file": case.key, **setting}, [row]))
            else:
                case.fields["speed_reason"] = str(row.get("reason") or "no figures came back")

    def _timed(self, cases: list[Case], progress: Progress) -> list[dict[str, Any]]:
        """A row of each. What keeps them from being measured in turn (memory for the largest) keeps only itself from
        being measured alone."""
        from fewbits.measure import bench

        s = self.settings
        measure = partial(bench, prompts=(s.prompt,), generate=(s.generate,), repeats=s.repeats, threads=s.threads,
                          progress=progress)
        paths = [self._file(case, progress) for case in cases]
        try:
            return [row.to_json() for row in measure(paths)]
        except FewbitsError as error:
            if len(cases) == 1:
                return [{"reason": str(error)}]
        for case in cases:
            case.fields["notes"] = (*case.fields.get("notes", ()), "its speed was measured by itself, not in turn")
        return [row for case in cases for row in self._timed([case], progress)]


def _listing(folder: str | None) -> list[Any] | None:
    """Files of tasks by name, size and time."""
    if folder is None:
        return None
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(Path(folder).iterdir()) if f.is_file()]
