"""Finishing: what files hold in floats anyway (scales, norms, biases) tuned by gradient towards the original, on the
calibration text. Codes stay, and nothing in the file's format changes.

The loss is the divergence of the logits from the original's where both models fit into memory; else each block is
tuned by itself, to put out what the original's block does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from fewbits.calibration.sources import Batch, Calibration
from fewbits.calibration.walk import Block, Walk
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError
from fewbits.finishing import goals
from fewbits.finishing.student import Student, seat
from fewbits.finishing.training import Outcome, train
from fewbits.jobs.store import Store
from fewbits.planning import available_bytes

STEPS = {"quick": 100, "thorough": 400}  # of one batch each; of every block, where blocks are tuned one by one
MOST = 200  # sequences: their last hidden states are kept in memory
HELD_OUT = 1 / 16  # of the calibration, to measure on
# the largest learning rate of a factor, over the square root of the loss: of a divergence, of a block's relative error
RATE, BLOCK_RATE = 0.0007, 0.003
BYTES = 12  # of memory a weight while whole models are tuned: the original in float32, codes, a layer's gradient
WHOLE, BLOCKS = "the whole model", "block by block"  # what is tuned at a time


def sequences(level: str) -> int:
    """How many sequences a level learns from and measures on: a new one each step, up to `MOST`."""
    return math.ceil(min(STEPS[level], MOST) / (1 - HELD_OUT))


def asked(level: str) -> bool:
    """Whether `level` is other than off.

    Raises:
        FewbitsError: no such level.
    """
    if level != "off" and level not in STEPS:
        raise FewbitsError(f"--finish {level}: no such level", "one of: off, " + ", ".join(STEPS))
    return level != "off"


def tune(source: Checkpoint, solved: Checkpoint, calibration: Calibration, level: str, store: Store,
         progress: Progress | None = None, seed: int = 0) -> tuple[Checkpoint, list[str]]:
    """`solved`, a quantized `source`, with its float parameters tuned on `calibration`; and what to say of it.

    A killed run goes on where it stopped when called again with the same store.

    Raises:
        FewbitsError: too little calibration to hold some out, a model whose logits are not known to be made so.
    """
    learn, held = calibration.split(HELD_OUT)
    batches = learn.batches + held.batches
    held_out = list(range(len(learn.batches), len(batches)))
    run = _Run(source, solved, batches, held_out, level, seed, store, progress)
    # what a killed run began is gone on with, whatever memory is free now
    fits = (store.read(run.key("way")) or b"").decode() or (
        WHOLE if BYTES * solved.parameters < available_bytes() else BLOCKS)
    store.write(run.key("way"), fits.encode())
    began, whole = time.monotonic(), fits == WHOLE
    names, outcome = run.whole() if whole else run.blocks()
    entries = {n: run.stored(e) if n in names else e for n, e in solved.entries.items()}
    what = "divergence on held-out text" if whole else "blocks' relative error on held-out text"
    note = (f"finished ({level}, {outcome.steps} steps{'' if whole else ' a block'}): {what} "
            f"{outcome.before:.4g} -> {outcome.after:.4g}, {time.monotonic() - began:.0f} s")
    return replace(solved, entries=entries), [note]


def _distance(block: Block, meant: list[torch.Tensor], number: int) -> torch.Tensor:
    """Squared distance of what the block puts out from what was meant, over its mean square."""
    return F.mse_loss(block.passes.output(number), meant[number]) / meant[number].square().mean()


@dataclass
class _Run:
    source: Checkpoint
    solved: Checkpoint
    batches: list[Batch]  # the last of them
    held_out: list[int]  # are these
    level: str
    seed: int
    store: Store
    progress: Progress | None

    @property
    def steps(self) -> int:
        return STEPS[self.level]

    def key(self, name: str) -> str:
        """What the store calls something of this level of finishing."""
        return f"finished, {self.level}: {name}"

    def stored(self, entry: Entry) -> Entry:
        return entry.as_(load=lambda: self.store.get(self.key(entry.name), entry.codec, entry.shape))

    def whole(self) -> tuple[set[str], Outcome]:
        """Both models in memory, the original's only until its last hidden states are known."""
        from fewbits.loading import load
        from fewbits.runtime.build import empty_model
        from fewbits.runtime.places import Places

        net = empty_model(self.solved.config, self.solved.path)
        student = seat(net, Places(net, self.solved), self.solved.entries.values(), net.get_output_embeddings())
        net.tie_weights()
        goal = goals.goal(load(self.source, kernel="decoded"), net, self.batches)

        def loss(i: int) -> torch.Tensor:
            return goal(goals.last_states(net, self.batches[i]), i)

        return self._train(student, loss, "model", RATE, self._advance("divergence", self.steps))

    def blocks(self) -> tuple[set[str], Outcome]:
        """One block in memory at a time, each on what the tuned ones before it put out."""
        names: set[str] = set()
        outcomes: list[Outcome] = []
        walk = Walk(self.source, self.batches, drift=True)
        advance = self._advance("relative error", self.steps * len(walk))
        for block in walk:
            assert block.original is not None
            with torch.no_grad():
                meant = [block.original.output(i) for i in range(len(self.batches))]
            student = seat(block.passes.module, walk.places, [self.solved.entries[n] for n in block.names])
            found, outcome = self._train(student, partial(_distance, block, meant), f"block {block.index}",
                                         BLOCK_RATE, advance)
            names |= found
            outcomes.append(outcome)
        count = max(1, len(outcomes))
        before, after = (sum(o) / count for o in zip(*((o.before, o.after) for o in outcomes), strict=True))
        return names, Outcome(before, after, self.steps)

    def _train(self, student: Student, loss: Callable[[int], torch.Tensor], what: str, rate: float,
               advance: Callable[[int, str], None]) -> tuple[set[str], Outcome]:
        outcome = train(student.parameters, loss, len(self.batches) - len(self.held_out), self.held_out,
                        steps=self.steps, rate=rate, seed=self.seed,
                        store=self.store, name=self.key(what), advance=advance)
        results = student.results()
        for name, q in results.items():
            self.store.put(self.key(name), q, {})
        return set(results), outcome

    def _advance(self, what: str, total: int) -> Callable[[int, str], None]:
        done = 0

        def advance(steps: int, loss: str) -> None:
            nonlocal done
            done += steps
            if self.progress:
                self.progress(f"finishing: {what} {loss}", done, total)

        return advance
