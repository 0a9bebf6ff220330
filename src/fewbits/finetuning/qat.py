"""Quantization-aware training: `fewbits finetune MODEL --qat RECIPE`.

It begins at a quantized file, given or made by `quantize`, and trains float weights under its codes, towards the
original's logits or on the text alone. What is written is what was multiplied by, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn

from fewbits import __version__, containers, hub
from fewbits.checkpoint import Checkpoint
from fewbits.containers.base import Progress, check_output, check_space, write
from fewbits.errors import FewbitsError
from fewbits.finetuning.checkpoints import KEPT
from fewbits.finetuning.data import Data, Example, split
from fewbits.finetuning.distilling import Distillation
from fewbits.finetuning.fake import Fake
from fewbits.finetuning.loop import HELD_OUT, Loss, Outcome, Settings, run, write_losses
from fewbits.finetuning.lora import digest, prepared
from fewbits.finetuning.loss import CausalLoss, Inputs
from fewbits.finetuning.student import student
from fewbits.finishing.files import check_original
from fewbits.finishing.student import Student
from fewbits.jobs.store import Store, identity, resumable
from fewbits.loading import load
from fewbits.memory import available_bytes
from fewbits.qtensor import QTensor
from fewbits.quantizing import quantize
from fewbits.recipe import ModelFacts
from fewbits.recipe import get as get_recipe

SETTINGS = Settings(rate=2e-3, warm_up=0.1, optimizer="adamw_torch_fused")  # rates are in levels of the codec
SCALES = ("learned", "refitted", "fixed")
REFIT_EVERY = 100  # steps
CALIBRATED = 64  # examples that the start is calibrated on, at most
BYTES = 9  # of memory a trained weight: itself, its gradient, its code; without the optimizer
TEACHER = 4  # and where there is a teacher
STATES = (("8bit", 2), ("4bit", 1), ("adafactor", 0), ("sgd", 0), ("", 8))  # bytes that optimizers keep of a weight


@dataclass(frozen=True)
class Trained:
    """What was written."""

    path: Path
    container: str
    recipe: str
    data: str
    scales: str
    distilled: bool
    outcome: Outcome
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One line: how long it learnt from what, and what it came to."""
        o, what = self.outcome, "divergence" if self.distilled else "loss"
        losses = [loss for _, loss in o.held_out or o.losses]
        on = " on held-out text" if o.held_out else ""
        return (f"{self.recipe} ({self.container}), {o.steps} steps on {self.data}, {what} {losses[0]:.4g} -> "
                f"{losses[-1]:.4g}{on}, {self.seconds:.0f} s")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def qat(model: str | Path | Checkpoint, out: str | Path, recipe: str, *, data: str | Path | Sequence[Example],
        start: str | Path | Checkpoint | None = None, container: str | None = None, distill: bool = True,
        scales: str = "learned", refit_every: int = REFIT_EVERY, settings: Settings = SETTINGS,
        progress: Progress | None = None) -> Trained:
    """Train `model` (a path in any format or a hub id) as the quantized model that `recipe` makes of it, into `out`.

    Training begins at `start`, a file of that recipe; without one at what `quantize` makes, calibrated on `data` (see
    `data.examples`). With `distill` the loss is the divergence of the next token's distribution from the original's,
    else the text's cross-entropy. `scales` are learned with the weights, or fitted anew to them after every
    `refit_every` steps, or stay fixed. Embeddings, the head and experts stay as they begin.

    Where the loss on what `settings` holds out did not fall, `out` is the start. A killed run resumes when called
    again. `OUT.loss.json` and `OUT.loss.png` are left beside it.

    Raises:
        FewbitsError: nothing to learn from or to train, a start of another model or recipe, too little memory, a loss
            that is not finite.
    """
    began = time.monotonic()
    if scales not in SCALES:
        raise FewbitsError(f"--scales {scales}: no such way", "one of: " + ", ".join(SCALES))
    source = model if isinstance(model, Checkpoint) else containers.open(hub.locate(model))
    target = containers.by_name(get_recipe(recipe, container).container)
    out = Path(out).resolve()
    check_output(out, source.path)
    given, told = prepared(data, source, settings)
    notes = [*told, *given.notes]
    opened = start if isinstance(start, Checkpoint) or start is None else containers.open(hub.locate(start))
    if opened is not None:
        _check_start(source, opened, recipe, container)
    _check_memory(source, distill, settings)
    check_space(out.parent, 2 * 12 * source.parameters)
    folder = out.with_name(f".{out.name}.work")
    stamp = {"model": identity(source), "start": opened and identity(opened), "recipe": recipe, "container": container,
             "data": digest(given), "distill": distill, "scales": [scales, refit_every], "version": __version__,
             "settings": asdict(settings) | {"save_every": None}}
    with resumable(folder):
        store = Store(folder, stamp)
        if opened is None:
            opened, more = _start(source, folder / f"start{target.suffix}", recipe, container, given, settings,
                                  progress)
            notes += more
        transformers.set_seed(settings.seed)
        seated = student(source, opened, getattr(torch, settings.dtype), scales == "learned")
        net = cast(transformers.PreTrainedModel, seated.root)
        loss: Loss = CausalLoss()
        if distill:
            loss = Distillation(load(source, kernel="decoded"), net, given[0])
        if scales == "refitted":
            loss = _Refitting(loss, seated, refit_every * settings.accumulation)
        outcome = run(net, given, settings, folder / "checkpoints", loss=loss, progress=progress)
        kept = out if outcome.diverged is None else out.with_name(f"{out.stem}.step-{outcome.steps}{out.suffix}")
        held = [value for _, value in outcome.held_out]
        worse = len(held) > 1 and held[-1] >= held[0]
        if worse:
            notes.append(f"on held-out text the loss did not fall ({held[0]:.4g} -> {held[-1]:.4g}): what is written "
                         "is the start; a smaller --rate or more text may help")
        write(target, kept, opened if worse else exported(opened, seated.results()), progress)
        write_losses(outcome, kept.parent, f"{kept.name}.loss")
        store.clear()
    if outcome.diverged is not None:
        raise FewbitsError(f"loss or gradient is not finite at step {outcome.diverged}: stopped; the model as it was "
                           f"after step {outcome.steps} is in {kept}", "take a smaller --rate; --start goes on from it")
    return Trained(out, target.name, recipe, given.description, scales, distill, outcome, time.monotonic() - began,
                   notes)


def exported(start: Checkpoint, results: dict[str, QTensor]) -> Checkpoint:
    """`start` with the tensors that were trained."""
    return replace(start, entries={n: e.as_(load=lambda q=results[n]: q) if n in results else e
                                   for n, e in start.entries.items()})


def _start(source: Checkpoint, path: Path, recipe: str, container: str | None, data: Data, settings: Settings,
           progress: Progress | None) -> tuple[Checkpoint, list[str]]:
    """What the model is quantized to, without training; of an earlier run, if that made it."""
    notes: list[str] = []
    if not path.exists():
        learn, _ = split(data, settings.held_out, HELD_OUT)
        some = learn.examples[::max(1, len(learn) // CALIBRATED)][:CALIBRATED]
        notes = quantize(source, path, recipe, calibration=[{"input_ids": e.input_ids[None]} for e in some],
                         container=container, progress=progress).notes
    return containers.open(path), notes


def _check_start(source: Checkpoint, start: Checkpoint, recipe: str, container: str | None) -> None:
    check_original(source, start)
    wanted = get_recipe(recipe, container)
    if start.container != wanted.container:
        raise FewbitsError(f"{start.path} is {start.container}, {recipe} goes to {wanted.container}",
                           f"--container {start.container}")
    for choice in wanted.resolve(ModelFacts.of(source), has_importance=True):
        found = start.entries.get(choice.name)
        if choice.solver and (found is None or found.codec != choice.codec):
            raise FewbitsError(f"{start.path}: {choice.name} is {found.codec.name if found else 'not there'}, {recipe} "
                               f"wants {choice.codec.name}", "give the recipe that it was made by")


def _check_memory(source: Checkpoint, distill: bool, settings: Settings) -> None:
    state = next(size for name, size in STATES if name in settings.optimizer)
    needed = (BYTES + state + (TEACHER if distill else 0)) * source.parameters
    if needed > (free := available_bytes()):
        raise FewbitsError(f"training {source.parameters} weights takes about {needed / 1e9:.1f} GB of memory, "
                           f"{free / 1e9:.1f} GB are free",
                           "less with --optimizer adafactor or --no-distill; --finish and LoRA take far less")


class _Refitting:
    """A loss before which parameters are fitted anew to the weights, once in every so many batches."""

    def __init__(self, loss: Loss, seated: Student, every: int):
        self.loss, self.every = loss, every
        self.layers = [layer for layer in seated.layers.values() if isinstance(layer, Fake)]
        seated.root.register_buffer(KEPT + "batches", torch.zeros((), dtype=torch.int64))

    def __call__(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        if torch.is_grad_enabled():
            batches = model.get_buffer(KEPT + "batches")
            if batches > 0 and batches % self.every == 0:
                for layer in self.layers:
                    layer.refit()
            batches += 1
        return self.loss(model, inputs)
