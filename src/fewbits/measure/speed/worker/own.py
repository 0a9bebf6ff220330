"""fewbits: its native decoder, and its layers in modules of Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .base import Another, Engine, Json, Rows
from .modules import Modules


class Decoder(Engine):
    kernel = "decoder"

    def __init__(self, job: Json):
        from fewbits import containers, errors
        from fewbits.runtime import decoder, engine

        self._open, self._compile, self._unsupported = containers.open, decoder.compile, errors.Unsupported
        self._where = engine.device(job.get("device"))
        self.sequences: list[Any] = []

    def load(self, job: Json) -> None:
        try:
            self.model = self._compile(self._open(Path(job["model"])), self._where)
        except self._unsupported as error:
            raise Another(str(error)) from None
        self.device = None if self._where is None else self.model.engine.name.removeprefix("decoder on ")

    def begin(self, rows: Rows, room: int) -> list[int]:
        self.sequences = []
        self.sequences = [self.model.sequence(room) for _ in rows]
        return self._next(rows)

    def step(self, tokens: list[int]) -> list[int]:
        return self._next([[token] for token in tokens])

    def _next(self, rows: Rows) -> list[int]:
        logits = self.model.step([(s, row, 1) for s, row in zip(self.sequences, rows, strict=True)])
        return [int(x.argmax()) for x in logits]


class Layers(Modules):
    def __init__(self, job: Json):
        super().__init__(job)
        from fewbits.loading import load

        self._load = load

    def read(self, job: Json) -> Any:
        self.kernel = job["kernel"] or "modules"
        return self._load(job["model"], kernel=job["kernel"])
