"""Who is measured, at what, and what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A model in an engine."""

    name: str
    model: Path
    engine: str
    engines: tuple[str, ...]  # the worker's names: the first that knows the model computes
    python: str
    kernel: str | None = None
    device: str | None = None  # None: the CPU


@dataclass(frozen=True)
class Work:
    """What a repetition does: prompts of `prompt` tokens, and `generate` more of each; or a training step on them."""

    prompt: int
    generate: int
    batch: int
    cache: bool = True
    train: bool = False

    def __str__(self) -> str:
        if self.train:
            return f"training step on {self.batch} x {self.prompt} tokens"
        after = f", {self.generate} after it" + ("" if self.cache else " without the cache") if self.generate else ""
        return f"prompt of {self.prompt} tokens{after}, batch {self.batch}"


@dataclass(frozen=True)
class Speed:
    """A candidate at a work: medians over repetitions. None is what was not measured; `reason` says why nothing was.

    Memory is the most since the process began, loading included. The first token's time is the prompt's; rates are of
    all sequences together.
    """

    candidate: str
    engine: str
    kernel: str
    prompt: int
    generate: int
    batch: int
    cache: bool
    train: bool = False
    reason: str | None = None
    repeats: int = 0
    import_seconds: float | None = None
    load_seconds: float | None = None
    first_token_seconds: float | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    token_seconds_median: float | None = None
    token_seconds_95: float | None = None
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    resident_bytes: int | None = None
    anonymous_bytes: int | None = None
    gpu_bytes: int | None = None
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)  # a figure's least and greatest repetition
    circumstances: Json = field(default_factory=dict)

    @property
    def work(self) -> Work:
        return Work(self.prompt, self.generate, self.batch, self.cache, self.train)

    def to_json(self) -> Json:
        return asdict(self)


def figures(work: Work, found: Sequence[Json]) -> Json:
    """Fields of a Speed, of what the worker said of each repetition (`work.repetition`)."""
    if work.train:
        return _spread({f"{way}_seconds": [f[way] for f in found] for way in ("forward", "backward")})
    rates = {"first_token_seconds": [f["first"] for f in found],
             "prefill_tokens_per_second": [work.batch * work.prompt / f["first"] for f in found]}
    if not work.generate:
        return _spread(rates)
    rates["decode_tokens_per_second"] = [work.batch * work.generate / sum(f["steps"]) for f in found]
    steps = sorted(s for f in found for s in f["steps"])
    return _spread(rates) | {"token_seconds_median": median(steps),
                             "token_seconds_95": steps[-(-95 * len(steps) // 100) - 1]}


def _spread(values: dict[str, list[float]]) -> Json:
    out: Json = {name: median(taken) for name, taken in values.items()}
    return out | {"spread": {name: (min(taken), max(taken)) for name, taken in values.items()}}


Progress = Callable[[str, int, int], None]
