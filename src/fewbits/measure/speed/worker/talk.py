"""Requests and answers: `load` once, then for each kind of work `warm` and any number of `repeat`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata

from .base import Another, Engine, Json
from .llama import LlamaCpp
from .memory import Memory
from .own import Decoder, Layers
from .peers import Bitsandbytes, Gptqmodel, Transformers
from .work import repetition, warm_up

ENGINES: dict[str, Callable[[Json], Engine]] = {
    "decoder": Decoder, "modules": Layers, "transformers": Transformers, "bitsandbytes": Bitsandbytes,
    "gptqmodel": Gptqmodel, "llama.cpp": LlamaCpp}


class Talk:
    def __init__(self) -> None:
        self.memory = Memory()

    def load(self, job: Json) -> Json:
        """By the first of some engines that knows the model."""
        for name in job["engines"]:
            began = time.perf_counter()
            engine = ENGINES[name](job)
            imported = time.perf_counter()
            try:
                with self.memory.watched():
                    engine.load(job)
            except Another:
                if name == job["engines"][-1]:
                    raise
                continue
            self.engine = engine
            return {"import": imported - began, "load": time.perf_counter() - imported, "kernel": engine.kernel,
                    "device": engine.device,
                    "versions": {name: metadata.version(name) for name in engine.packages}}
        raise AssertionError("no engine was named")

    def warm(self, job: Json) -> Json:
        self.job = job
        return warm_up(self.engine, job, self.memory)

    def repeat(self, job: Json) -> Json:
        return repetition(self.engine, self.job)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    talk = Talk()
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = getattr(talk, job["do"])(job)
        except Exception as error:  # whatever an engine raises is the reason why there is no figure
            answer = {"error": (str(error).strip().splitlines() or [type(error).__name__])[0]}
        print(json.dumps(answer), file=answers, flush=True)
