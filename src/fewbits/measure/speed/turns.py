"""Candidates in turns: noise of the machine then falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from fewbits.measure.speed.process import Failed, Worker
from fewbits.measure.speed.rows import Candidate, Json, Speed, Work, figures

LEAST = 2  # repetitions, whatever the time


class Runner:
    """A candidate, its process where there is one now, and what was found."""

    def __init__(self, candidate: Candidate, threads: int):
        self.candidate, self.threads = candidate, threads
        self.worker: Worker | None = None
        self.loads: list[Json] = []
        self.broken: str | None = None  # why nothing works, or this work does not
        self.reason: str | None = None

    def begin(self, job: Json) -> None:
        """Another work."""
        self.job, self.reason, self.found, self.warmed = job | {"way": None}, self.broken, list[Json](), Json()
        self._guarded(self._ready)

    def repeat(self) -> None:
        self._guarded(self._repeat)

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
        self.worker = None

    def _guarded(self, what: Callable[[], None]) -> None:
        if self.reason is None:
            try:
                what()
            except Failed as failed:
                self.reason = str(failed)
                self.close()

    def _ready(self) -> None:
        if self.worker is None:
            self.worker, c = Worker(self.candidate.python, self.threads), self.candidate
            try:
                self.loads.append(self.worker.ask("load", engines=c.engines, model=str(c.model), kernel=c.kernel,
                                                  device=c.device, threads=self.threads))
            except Failed as failed:
                self.broken = str(failed)
                raise
        self.warmed = self.worker.ask("warm", **self.job)
        self.job["way"] = self.warmed["way"]

    def _repeat(self) -> None:
        if self.worker is None:
            self._ready()
        assert self.worker is not None
        self.found.append(self.worker.ask("repeat"))

    def speed(self, work: Work, circumstances: Json) -> Speed:
        c, measured = self.candidate, Json()
        if self.reason is None:
            measured = figures(work, self.found) | {f"{name}_bytes": self.warmed[name] for name in (
                "resident", "anonymous", "gpu")} | {
                f"{name}_seconds": median(said[name] for said in self.loads) for name in ("import", "load")}
        said = {"engine_versions": "versions", "device": "device"}
        own = {key: self.loads[0][name] for key, name in said.items() if self.loads and self.loads[0][name]}
        kernel = self.warmed.get("kernel") or c.kernel or ""
        return Speed(c.name, c.engine, kernel, work.prompt, work.generate, work.batch, work.cache, work.train,
                     self.reason, len(self.found), circumstances=circumstances | own, **measured)


def measure(runners: Sequence[Runner], job: Json, repeats: int, seconds: float | None, together: bool,
            tick: Callable[[str], Any]) -> None:
    """`repeats` repetitions of a work by everyone, in rounds; after `seconds` no further round is begun.

    Unless all fit into memory `together`, each gives way to the next one, and loads its model again for every turn.
    """
    began = time.monotonic()
    for done in range(-1, repeats):
        if done >= LEAST and seconds is not None and time.monotonic() - began > seconds:
            break
        for runner in runners:
            tick(runner.candidate.name)
            runner.begin(job) if done < 0 else runner.repeat()
            if not together:
                runner.close()
