"""`finetune`: a LoRA adapter on a model in any format, trained by peft through its packed weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from fewbits import __version__, containers, hub
from fewbits.calibration.sources import fitting
from fewbits.checkpoint import Checkpoint
from fewbits.containers import gguf_lora
from fewbits.containers.base import Progress, check_output, remove, sync
from fewbits.errors import FewbitsError
from fewbits.finetuning.adapters import Lora, attach, save
from fewbits.finetuning.data import Data, Example, examples
from fewbits.finetuning.loop import Outcome, Settings, run, trainable_on, write_losses
from fewbits.jobs.store import Store, identity, resumable
from fewbits.loading import load
from fewbits.runtime.build import tokenizer_of


@dataclass(frozen=True)
class Finetuned:
    """What was written."""

    path: Path
    base: str  # the model that the adapter belongs to
    data: str
    outcome: Outcome
    gguf: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One line: how long it learnt from what, and what it came to."""
        o = self.outcome
        losses = [loss for _, loss in o.held_out or o.losses]
        on = " on held-out text" if o.held_out else ""
        return (f"adapter of {o.trained} parameters for {self.base}, {o.steps} steps on {self.data}, "
                f"loss {losses[0]:.4g} -> {losses[-1]:.4g}{on}, {o.seconds:.0f} s")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "gguf": self.gguf and str(self.gguf)}


def finetune(model: str | Path | Checkpoint, out: str | Path, *, data: str | Path | Sequence[Example],
             recipe: str | None = None, lora: Lora | None = None, adapter: str | Path | None = None,
             gguf: str | Path | None = None, settings: Settings | None = None, kernel: str | None = None,
             device: str | None = None, trust_remote_code: bool = False,
             progress: Progress | None = None) -> Finetuned:
    """Train a LoRA adapter of `model` (a path in any format or a hub id, quantized or not) on `data`.

    `recipe` quantizes the model when it is loaded: QLoRA is `recipe="nf4"` on a model of 16 bits.
    `out` becomes a directory as peft writes it, with `loss.json` and `loss.png` beside the weights; `gguf` a file with
    the same adapter for llama.cpp. `adapter` is a peft directory to go on from. For `data` see `data.examples`.

    It happens on `device`; by default (None, "auto") on the GPU if there is one, else on the CPU.

    A killed run resumes when called again. Where the loss turns NaN, the last good adapter goes to `OUT.step-N`.

    Raises:
        FewbitsError: nothing to learn from, an adapter of another model, a loss that is not finite, no such device.
    """
    settings, lora, place = settings or Settings(), lora or Lora(), trainable_on(device)
    source = model if isinstance(model, Checkpoint) else containers.open(hub.locate(model))
    out, base = Path(out).resolve(), str(source.path if isinstance(model, Checkpoint) else model)
    check_output(out, source.path)
    file = None if gguf is None else Path(gguf).resolve()
    if file is not None:
        check_output(file, source.path)
    given, notes = prepared(data, source, settings)
    folder = out.with_name(f".{out.name}.work")
    stamp = {"model": identity(source), "data": digest(given), "lora": asdict(lora),
             "adapter": str(adapter), "recipe": recipe, "settings": asdict(settings) | {"save_every": None},
             "kernel": kernel, "version": __version__}
    with resumable(folder):
        store = Store(folder, stamp)
        transformers.set_seed(settings.seed)
        net = load(source, recipe=recipe, device=place, dtype=dtype(settings), kernel=kernel,
                   trust_remote_code=trust_remote_code, progress=progress)
        if not net.can_generate() or net.config.is_encoder_decoder:
            raise FewbitsError(f"{source.path}: {source.architecture} does not continue text",
                               "fine-tuning is for decoders of text")
        tuned = attach(net, lora, adapter, base)
        outcome = run(tuned, given, settings, folder / "checkpoints", progress=progress)
        kept = out if outcome.diverged is None else out.with_name(f"{out.name}.step-{outcome.steps}")
        _write(tuned, outcome, kept)
        store.clear()
    if outcome.diverged is not None:
        raise FewbitsError(f"loss or gradient is not finite at step {outcome.diverged}: stopped; the adapter as it was "
                           f"after step {outcome.steps} is in {kept}",
                           "take a smaller --rate; --adapter goes on from there")
    if file is not None:
        gguf_lora.to_gguf(out, source.config, file)
    return Finetuned(out, base, given.description, outcome, file, [*notes, *given.notes])


def prepared(data: str | Path | Sequence[Example], source: Checkpoint,
             settings: Settings) -> tuple[Data, tuple[str, ...]]:
    """The examples that `data` says, for this model, and what differs from what was asked."""
    if isinstance(data, Data):
        return data, ()
    if not isinstance(data, (str, Path)):
        return Data(tuple(data), f"{len(data)} examples"), ()
    length, notes = fitting(settings.length, source)
    wanted = settings.steps and settings.steps * settings.batch * settings.accumulation
    return examples(data, tokenizer_of(source), length=length, most=wanted), notes


def dtype(settings: Settings) -> torch.dtype:
    """The type of activations.

    Raises:
        FewbitsError: none that is trained in.
    """
    if settings.dtype not in ("float32", "bfloat16"):
        raise FewbitsError(f"--dtype {settings.dtype}: no type to train in", "float32 or bfloat16")
    found: torch.dtype = getattr(torch, settings.dtype)
    return found


def digest(data: Data) -> str:
    """SHA-256 of all tokens and labels."""
    found = hashlib.sha256()
    for example in data.examples:
        for tensor in (example.input_ids, example.labels):
            found.update(f"{len(tensor)};".encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def _write(tuned: Any, outcome: Outcome, out: Path) -> None:
    """The adapter under a name of its own, until it is whole."""
    partial = out.with_name(f".{out.name}.partial")
    remove(partial)
    remove(out)
    try:
        save(tuned, partial)
        write_losses(outcome, partial)
        sync(partial)
        os.replace(partial, out)
    except BaseException:
        remove(partial)
        raise
