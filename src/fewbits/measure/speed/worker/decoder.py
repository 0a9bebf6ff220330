"""fewbits' native decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .base import Another, Engine, Json, Rows


class Decoder(Engine):
    kernel = "decoder"

    def __init__(self, job: Json):
        from fewbits import containers, errors
        from fewbits.runtime import decoder

        self._open, self._compile, self._unsupported = containers.open, decoder.compile, errors.Unsupported
        self.sequences: list[Any] = []

    def load(self, job: Json) -> None:
        try:
            self.model = self._compile(self._open(Path(job["model"])))
        except self._unsupported as error:
            raise Another(str(error)) from None

    def begin(self, rows: Rows, room: int) -> list[int]:
        self.sequences = []
        self.sequences = [self.model.sequence(room) for _ in rows]
        return self._next(rows)

    def step(self, tokens: list[int]) -> list[int]:
        return self._next([[token] for token in tokens])

    def _next(self, rows: Rows) -> list[int]:
        logits = self.model.step([(s, row, 1) for s, row in zip(self.sequences, rows, strict=True)])
        return [int(x.argmax()) for x in logits]
