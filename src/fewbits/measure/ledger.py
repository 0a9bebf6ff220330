"""What was measured of a model, a line each in a file of the cache: a killed run goes on after the last whole line."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import fewbits
from fewbits import caching

Key = tuple[str, str, bool]


@dataclass(frozen=True)
class Loss:
    """What one tensor loses in one codec: divergence of the model's next token from the original's when it alone is
    quantized, mean nats a token."""

    tensor: str
    codec: str
    kl: float
    error: float | None  # standard error; None of an estimate
    measured: bool  # with the whole model run on it; else estimated from the curvature

    @property
    def key(self) -> Key:
        return self.tensor, self.codec, self.measured


class Ledger:
    """Losses under the same circumstances: `known` tells those from others. Without a file where `known` is None."""

    def __init__(self, known: Any):
        text = None if known is None else json.dumps([fewbits.__version__, known], sort_keys=True, default=str)
        name = None if text is None else f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.jsonl"
        self.file = None if name is None else caching.folder("sensitivity") / name
        self.losses: dict[Key, Loss] = {}
        if self.file is not None and self.file.exists():
            whole = self.file.read_text(encoding="utf-8").rpartition("\n")[0]
            self.file.write_text(whole + "\n" * bool(whole), encoding="utf-8")  # without half a line
            self.losses = {loss.key: loss for loss in (Loss(**json.loads(line)) for line in whole.splitlines())}

    def add(self, losses: list[Loss]) -> None:
        self.losses |= {loss.key: loss for loss in losses}
        if self.file is not None:
            with open(self.file, "a", encoding="utf-8") as out:
                out.write("".join(json.dumps(asdict(loss)) + "\n" for loss in losses))
