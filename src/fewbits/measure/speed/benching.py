"""`bench`: the speed of models at some works, in some engines."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path

from fewbits import instructions
from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError
from fewbits.measure.circumstances import circumstances
from fewbits.measure.speed import choosing
from fewbits.measure.speed.rows import Candidate, Json, Progress, Speed, Work
from fewbits.measure.speed.turns import Runner, measure
from fewbits.memory import available_bytes
from fewbits.runtime import engine


def bench(models: str | Path | Sequence[str | Path], *, prompts: Sequence[int] = (512,),
          generate: Sequence[int] = (64,), batches: Sequence[int] = (1,), cache: Sequence[bool] = (True,),
          repeats: int = 5, threads: int | None = None, kernels: Sequence[str | None] = (None,), train: bool = False,
          peers: Mapping[str, str | None] | None = None, device: str | None = None, seconds: float | None = None,
          seed: int = 0, progress: Progress | None = None) -> list[Speed]:
    """Every model at every work: a prompt of so many random tokens and so many tokens after it, several texts at once.

    By default (None, or "decoder") the decoder computes, where it knows the model, and on `device` where that names a
    GPU: circumstances then have its name. What else there is stays on the CPU. `kernels` may name others:
    "modules", which is `fewbits.load` with its own choice, or one that `load` takes. `train` adds a training step,
    forward and backward to the inputs, through the modules. `peers` are other engines for the same files:
    "transformers", "bitsandbytes", "gptqmodel" or "llama.cpp", each with the Python that has it (None: this one).
    Candidates take turns, each in a process of its own, after a warm-up; after `seconds` at a work no further round is
    begun, but two are.

    What an engine cannot read or do is a row with the reason.

    Raises:
        FewbitsError: nothing readable there, an unknown kernel or peer, a work too long for a model's context or too
            large for the free memory. Nothing has run then.
    """
    if repeats < 1 or (threads is not None and threads < 1):
        raise FewbitsError(f"{repeats} repeats, {threads} threads: at least 1 is needed")
    opened = choosing.opened([models] if isinstance(models, (str, Path)) else models)
    peers, threads = peers or {}, threads or instructions.threads()
    choosing.check_kernels(kernels)
    device = None if engine.device(device) is None else device
    choosing.check_peers(peers)
    candidates = choosing.candidates(opened, kernels, peers, device=device)
    rounds = [(choosing.works(prompts, generate, batches, cache), candidates)]
    if train:
        rounds.append((choosing.trainings(prompts, batches), choosing.candidates(opened, kernels, peers, True)))
    needed: dict[Candidate, int] = {}
    for works, candidates in rounds:
        choosing.check_context(opened, works)
        for c in candidates:
            needed[c] = max(needed.get(c, 0), choosing.needed_bytes(opened[c.name], c, works))
    choosing.check_memory(needed)
    about = {name: _about(checkpoint, threads, seed) for name, checkpoint in opened.items()}
    least = min(choosing.vocabulary(checkpoint) for checkpoint in opened.values())
    ticks = _Ticks(progress, sum(len(w) * len(c) * (1 + repeats) for w, c in rounds))
    together = sum(needed.values()) < available_bytes()
    runners, found = {c: Runner(c, threads) for c in needed}, list[Speed]()
    try:
        for works, candidates in rounds:
            for work in works:
                taking = [runners[c] for c in candidates]
                ticks.begin(str(work), len(taking) * (1 + repeats))
                measure(taking, _job(work, least, seed), repeats, seconds, together, ticks)
                found += [r.speed(work, about[r.candidate.name]) for r in taking]
    finally:
        for runner in runners.values():
            runner.close()
    return found


def _about(checkpoint: Checkpoint, threads: int, seed: int) -> Json:
    about = circumstances(checkpoint, threads=threads, seed=seed)
    about["machine"]["threads"] = threads  # not this process' own
    return about


def _job(work: Work, vocabulary: int, seed: int) -> Json:
    draw = random.Random(seed)
    return {"prompts": [draw.choices(range(vocabulary), k=work.prompt) for _ in repeat(None, work.batch)],
            "generate": work.generate, "cache": work.cache, "train": work.train}


class _Ticks:
    """Tells how far it is."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done, self.next, self.what = progress, total, 0, 0, ""

    def begin(self, what: str, turns: int) -> None:
        self.what, self.done = what, self.next  # rounds that time did not allow are done as well
        self.next += turns

    def __call__(self, name: str) -> None:
        if self.progress:
            self.progress(f"measuring: {name}, {self.what}", self.done, self.total)
        self.done += 1
