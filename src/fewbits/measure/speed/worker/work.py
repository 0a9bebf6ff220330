"""A repetition: some prompts and the tokens after them, or a training step; and what is done before the first one."""

from __future__ import annotations

import time

from .base import Engine, Json
from .memory import Memory

TRIED = 16  # tokens after the prompts, to see which way is the fastest


def repetition(engine: Engine, job: Json) -> Json:
    """Seconds of the prompts, first token included, and of each token after it; or of a training step."""
    rows, cached = job["prompts"], job["cache"]
    if job["train"]:
        return engine.train(rows)
    clock, steps = time.perf_counter, []
    began = clock()
    tokens = engine.begin(rows, room(job)) if cached else engine.whole(rows)
    first = clock() - began
    for _ in range(job["generate"]):
        began = clock()
        if cached:
            tokens = engine.step(tokens)
        else:
            rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
            tokens = engine.whole(rows)
        steps.append(clock() - began)
    return {"first": first, "steps": steps}


def room(job: Json) -> int:
    return len(job["prompts"][0]) + job["generate"]


def warm_up(engine: Engine, job: Json, memory: Memory) -> Json:
    """The way to compute that is the fastest; memory is watched here, where no time counts."""
    ways = engine.ways if job["way"] is None else (job["way"],)
    little = job | {"prompts": [row[:8] for row in job["prompts"]], "generate": min(2, job["generate"])}
    trial = job | {"generate": min(TRIED, job["generate"])}
    seconds: dict[str, float] = {}
    refused: Exception | None = None

    def ready(way: str) -> None:
        engine.take(way)
        if not job["train"]:
            engine.make_room(len(job["prompts"]), room(job))
        repetition(engine, little)

    with memory.watched():
        for way in ways:
            try:
                ready(way)
                began = time.perf_counter()
                if len(ways) > 1:
                    repetition(engine, trial)
                seconds[way] = time.perf_counter() - began
            except (RuntimeError, ValueError, NotImplementedError) as error:
                refused = error
        if not seconds:
            assert refused is not None
            raise refused
        best = min(seconds, key=lambda way: seconds[way])
        if best != ways[-1]:
            ready(best)
        if len(ways) == 1 or trial["generate"] < job["generate"]:
            _largest(engine, job)
    return {"way": best, "kernel": engine.kernel} | memory.most()


def _largest(engine: Engine, job: Json) -> None:
    """What takes the most memory of a repetition."""
    if job["cache"] or not job["generate"]:
        repetition(engine, job)
    else:
        engine.whole([[*row, *row[:1] * job["generate"]] for row in job["prompts"]])
