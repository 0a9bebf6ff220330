"""The whole way in one call: quantize a model, train an adapter on it, merge that into the model, quantize the sum."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits import __version__, containers, hub
from fewbits.calibration.documents import spread
from fewbits.calibration.sources import Calibration, fitting
from fewbits.checkpoint import Checkpoint
from fewbits.codecs.floats import Float
from fewbits.containers import peft
from fewbits.containers.base import Progress, check_output
from fewbits.containers.directory import read_json, write_json
from fewbits.errors import FewbitsError
from fewbits.finetuning.adapters import Lora
from fewbits.finetuning.data import Data, Example, split
from fewbits.finetuning.loop import HELD_OUT, Settings, trainable_on
from fewbits.finetuning.lora import digest, finetune, prepared
from fewbits.jobs.store import Store, identity, resumable
from fewbits.merging import SAMPLES as MEASURED
from fewbits.merging import Merged, Text, merge
from fewbits.quantizing import quantize
from fewbits.recipe import get as get_recipe
from fewbits.recipe.allocation import target

BASE, AS_IT_IS = "nf4", "the model as it is"  # what an adapter is trained on where nothing is said, or else
INTO = ("original", "base")
SAMPLES, LENGTH = 64, 512  # of the training data, to calibrate on


@dataclass(frozen=True)
class Deployed:
    """What was written: a model, and the adapter in it."""

    path: Path
    adapter: Path
    trained_on: str  # the recipe of the model that it was trained on
    training: dict[str, Any]  # the outcome, as in the adapter's loss.json
    merged: Merged
    seconds: float
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "adapter": str(self.adapter), "merged": self.merged.to_json()}


def deploy(model: str | Path, out: str | Path, to: str, *, data: str | Path | Sequence[Example],
           base: str | None = BASE, into: str = "original", lora: Lora | None = None, settings: Settings | None = None,
           calibration: Text | None = None, device: str | None = None, progress: Progress | None = None,
           **options: Any) -> Deployed:
    """Fine-tune `model` on `data` and write the result, quantized by the recipe `to`, to `out`.

    `model` is quantized by the recipe `base` without calibration, unless that is None or "none" or it is quantized
    already; an adapter is trained on that (see `finetune`), merged `into` the original `model` itself or into the
    decoded "base", and the sum quantized on `calibration`, by default on the training data (`options`: others of
    `quantize`'s). The adapter is left in `OUT.adapter`. Divergence from what was trained is measured on what was held
    out of the data.

    `device` is that of `finetune` and of `quantize`.

    Every step of a killed call is gone on with when it is called again.

    Raises:
        FewbitsError: anything that one of the steps refuses; recipes and data before the first begins.
    """
    began = time.monotonic()
    settings, out = settings or Settings(), Path(out).resolve()
    trainable_on(device)
    source = containers.open(hub.locate(model))
    kept, work = out.with_name(f"{out.name}.adapter"), out.with_name(f".{out.name}.deploy")
    for path in (out, kept):
        check_output(path, source.path)
    if target(to) is None:
        get_recipe(to, options.get("container"))
    if into not in INTO:
        raise FewbitsError(f"--into {into}: nothing to merge into", "one of: " + ", ".join(INTO))
    recipe = None if base in (None, "none") or _is_packed(source) else base
    if recipe is not None:
        get_recipe(recipe)
    given, notes = prepared(data, source, settings)
    stamp = {"model": identity(source), "data": digest(given), "base": recipe, "lora": asdict(lora or Lora()),
             "settings": asdict(settings) | {"save_every": None}, "version": __version__}
    with resumable(work):
        store = Store(work, stamp)
        trained, adapter = source.path, work / "adapter"
        if recipe is not None:
            trained = work / recipe
            if not trained.exists():
                quantize(source, trained, recipe, calibration="none", device=device, progress=progress)
        if not adapter.exists():
            finetune(trained, adapter, data=given, lora=lora, settings=settings, device=device,
                     progress=progress)
        learn, held = split(given, settings.held_out, HELD_OUT)
        length = fitting(LENGTH, source)[0]
        text = windows(held, MEASURED, length, "held out of ") if len(held) else windows(learn, MEASURED, length)
        merged = merge(adapter, source if into == INTO[0] else trained, out, to=to, trained_on=trained, text=text,
                       calibration=calibration or windows(learn, SAMPLES, length), progress=progress, device=device,
                       **options)
        _keep(adapter, kept, str(model))
        store.clear()
    return Deployed(out, kept, recipe or AS_IT_IS, read_json(kept / "loss.json"), merged, time.monotonic() - began,
                    (*notes, *given.notes, *merged.notes))


def _is_packed(source: Checkpoint) -> bool:
    return any(not isinstance(e.codec, Float) for e in source.entries.values())


def _keep(adapter: Path, out: Path, model: str) -> None:
    """The adapter beside the result. What it was trained on goes; the model that this was made from stays."""
    settings = read_json(adapter / peft.CONFIG)
    trained, card = settings.get("base_model_name_or_path"), adapter / "README.md"
    if trained and trained != model:
        write_json(adapter / peft.CONFIG, settings | {"base_model_name_or_path": model})
        if card.is_file():
            card.write_text(card.read_text(encoding="utf-8").replace(trained, model), encoding="utf-8")
    os.replace(adapter, out)


def windows(data: Data, samples: int, length: int, which: str = "") -> Calibration:
    """The examples one after another, cut into sequences of equal length."""
    tokens = torch.cat([example.input_ids for example in data.examples])
    length = min(length, len(tokens))
    starts = spread(len(tokens), samples, length, 0)
    return Calibration([{"input_ids": tokens[None, at:at + length]} for at in starts],
                       f"{which}{data.description}: {len(starts)} x {length} tokens")
