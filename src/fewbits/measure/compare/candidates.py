"""What was found of one model file among those compared, and of all of them together."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("original", "recipe", "file")


@dataclass(frozen=True)
class Candidate:
    """One row. Figures are None where `reason`, or the reason beside them, says why there are none."""

    name: str
    kind: str  # the original itself, a recipe that it was quantized by, or a file that was given
    path: str = ""
    container: str = ""
    nbytes: int = 0  # of all its files
    bits_per_weight: float = 0.0  # of all tensors
    seconds: float | None = None  # quantizing took
    calibration: str | None = None
    estimated_bytes: int = 0  # of memory: weights, cache of 4096 tokens, working memory, as `plan` counts them
    notes: tuple[str, ...] = ()
    reason: str = ""  # why nothing could be measured
    quality: dict[str, Any] | None = None  # `Divergence.to_json()`
    speed: tuple[dict[str, Any], ...] = ()  # `Speed.to_json()`
    speed_reason: str = ""
    tasks: tuple[dict[str, Any], ...] = ()  # `TaskResult.to_json()`
    tasks_reason: str = ""
    layers: tuple[dict[str, Any], ...] = ()  # kind, layer, error
    layers_reason: str = ""

    @property
    def kl(self) -> float | None:
        """Mean divergence from the original; None where it is unknown or no number."""
        return finite((self.quality or {}).get("kl_mean"))

    @property
    def top1(self) -> float | None:
        return finite((self.quality or {}).get("top1"))

    def quick(self, figure: str) -> float | None:
        """A figure of the first setting whose speed was measured."""
        return next((finite(row.get(figure)) for row in self.speed), None)

    @property
    def memory_bytes(self) -> int:
        """Measured while it computed, where it did; else estimated."""
        return int(self.quick("resident_bytes") or self.estimated_bytes)


@dataclass(frozen=True)
class Advice:
    """An answer to a question, and why."""

    question: str
    take: str | None
    why: str


@dataclass(frozen=True)
class Comparison:
    """One model in several formats. `candidates[0]` is the model itself."""

    model: str
    architecture: str
    parameters: int
    candidates: tuple[Candidate, ...]
    frontier: tuple[str, ...]  # names: nothing is both smaller and nearer to the original
    advice: tuple[Advice, ...]  # the first is the answer
    settings: dict[str, Any]
    commands: tuple[str, ...]  # that repeat it
    circumstances: dict[str, Any]
    date: str
    out: Path = field(default=Path("."), compare=False)

    @property
    def original(self) -> Candidate:
        return self.candidates[0]

    @property
    def measured(self) -> list[Candidate]:
        """Those whose divergence is known, the original aside."""
        return [c for c in self.candidates[1:] if c.kl is not None]

    def to_json(self) -> dict[str, Any]:
        """NaN and infinities as text: JSON has none."""
        return plain({**asdict(self), "out": str(self.out)})


def finite(value: Any) -> float | None:
    """A number, or None for NaN, infinities and nothing."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
