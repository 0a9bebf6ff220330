"""The training loop: Transformers' Trainer on the parameters that are trained, stopped and resumed safely.

Checkpoints hold the trained parameters and the state of the optimizer, whatever the model around them is.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from fewbits import devices
from fewbits.containers.base import Progress, remove
from fewbits.errors import FewbitsError
from fewbits.finetuning.checkpoints import Checkpointed, complete, restore
from fewbits.finetuning.data import IGNORED, Data, Example, split
from fewbits.finetuning.loss import CausalLoss, Inputs
from fewbits.finetuning.saving import halved

HELD_OUT = 16  # examples that are held out at most: measuring takes time from learning
CHECKS = 4  # times that they are measured on the way
RECENT = 10  # steps whose mean loss is told

Loss = Callable[[nn.Module, Inputs], torch.Tensor]  # the mean over the learnt tokens of a batch


@dataclass(frozen=True)
class Settings:
    """How a model is trained. Names of schedules and optimizers are those of Transformers' Trainer."""

    epochs: float = 1.0
    steps: int | None = None  # of the optimizer, instead of epochs
    batch: int = 4  # examples at a time
    accumulation: int = 1  # times a batch, before the optimizer's step
    length: int = 512  # tokens of an example, at most
    rate: float = 2e-4
    schedule: str = "cosine"
    warm_up: float = 0.03  # share of the steps
    weight_decay: float = 0.0
    optimizer: str = "adamw_torch"
    clip: float = 1.0  # largest norm of a gradient
    seed: int = 0
    dtype: str = "float32"
    checkpointing: bool = False  # compute activations again instead of keeping them
    compact: bool = True  # keep float32 activations for the backward pass in bfloat16
    held_out: float = 0.05  # share of the examples that the model is measured on
    shuffle: bool = True
    save_every: float = 120.0  # seconds

    def total(self, examples: int) -> int:
        """Steps of the optimizer."""
        each = math.ceil(math.ceil(examples / self.batch) / self.accumulation)
        return self.steps if self.steps is not None else max(1, math.ceil(self.epochs * each))


@dataclass(frozen=True)
class Outcome:
    """What came of a training."""

    steps: int
    losses: list[tuple[int, float]]  # of every step
    held_out: list[tuple[int, float]]  # mean loss on what was held out, at some steps; empty if nothing was
    trained: int  # parameters
    seconds: float  # of this call
    diverged: int | None = None  # the step whose loss or gradient was not finite: parameters are those of `steps`
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run(model: nn.Module, examples: Sequence[Example], settings: Settings, out: Path, *, loss: Loss | None = None,
        progress: Progress | None = None) -> Outcome:
    """Train the parameters of `model` that ask for gradients on `examples`.

    `out` is a folder for checkpoints: a killed run goes on from the last one when called again with the same
    arguments. `loss` replaces the cross-entropy of the next token. A loss or gradient that is not finite ends the
    training: the model then has the parameters of the last checkpoint, and `diverged` says where it happened.

    Raises:
        FewbitsError: nothing to learn from, an optimizer that is not there.
    """
    if not len(examples):
        raise FewbitsError("no examples to learn from")
    data = examples if isinstance(examples, Data) else Data(tuple(examples), "examples")
    learn, held = split(data, settings.held_out, HELD_OUT)
    total, began = settings.total(len(learn)), time.monotonic()
    watch = _Watch(settings.save_every, total, progress)
    last, diverged = _last(out), None
    trainer = _trainer(model, learn, held, settings, total, out, loss or CausalLoss(), watch)
    trainer.args.eval_on_start = bool(len(held)) and last is None
    try:
        trainer.train(resume_from_checkpoint=last)
    except _Diverged:
        diverged, last = trainer.state.global_step + 1, _last(out)
        if last is None:
            raise FewbitsError(f"loss or gradient is not finite at step {diverged}, before anything was learnt",
                               "take a smaller --rate, or look into the data") from None
        restore(model, Path(last))
    except ImportError as error:
        raise FewbitsError(f"--optimizer {settings.optimizer}: {_first(error)}",
                           "adamw_torch is always there") from None
    history = trainer.state.log_history
    steps = int(Path(last).name.rpartition("-")[2]) if diverged and last else trainer.state.global_step
    return Outcome(steps, [(int(h["step"]), h["loss"]) for h in history if "loss" in h],
                   [(int(h["step"]), h["eval_loss"]) for h in history if "eval_loss" in h],
                   sum(p.numel() for p in model.parameters() if p.requires_grad), time.monotonic() - began, diverged,
                   asdict(settings))


def trainable_on(name: str | None) -> torch.device:
    """The device called `name`, if a model can be trained there.

    Raises:
        FewbitsError: there is none, or a GPU that Transformers' Trainer does not take.
    """
    found = devices.find(name)
    if found.index:
        raise FewbitsError(f"{found}: fine-tuning takes the first GPU",
                           f"CUDA_VISIBLE_DEVICES={found.index} makes it the first")
    return found


def _last(out: Path) -> str | None:
    """The last checkpoint that was written to its end; broken ones are removed."""
    while out.is_dir() and (found := get_last_checkpoint(out)):
        if complete(Path(found)):
            return str(found)
        remove(Path(found))
    return None


def _trainer(model: nn.Module, learn: Data, held: Data, settings: Settings, total: int, out: Path, loss: Loss,
             watch: _Watch) -> _Trainer:
    try:
        arguments = transformers.TrainingArguments(
            output_dir=str(out), max_steps=total, per_device_train_batch_size=settings.batch,
            per_device_eval_batch_size=settings.batch, gradient_accumulation_steps=settings.accumulation,
            learning_rate=settings.rate, lr_scheduler_type=settings.schedule,
            warmup_steps=math.ceil(settings.warm_up * total), weight_decay=settings.weight_decay,
            optim=settings.optimizer, max_grad_norm=settings.clip, seed=settings.seed, data_seed=settings.seed,
            gradient_checkpointing=settings.checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=next(model.parameters()).device.type == "cpu",
            train_sampling_strategy="random" if settings.shuffle else "sequential",
            eval_strategy="steps" if len(held) else "no", eval_steps=math.ceil(total / CHECKS),
            logging_steps=1, logging_nan_inf_filter=False, save_strategy="no",
            save_total_limit=2, report_to="none", disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=False, label_names=["labels"])
    except ValueError as error:
        raise FewbitsError(f"--optimizer {settings.optimizer}, --schedule {settings.schedule}: {_first(error)}",
                           "names are those of Transformers' TrainingArguments") from None
    arguments._n_gpu = min(1, arguments.n_gpu)  # else the model would be copied to all that there are
    trainer = _Trainer(model, arguments, train_dataset=learn, eval_dataset=held if len(held) else None,
                       data_collator=_Padded(_padding(model)), callbacks=[watch])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.compact = settings.compact
    trainer.loss, trainer.model_accepts_loss_kwargs = loss, True  # which is weighed here, not by Trainer
    return trainer


def _padding(model: nn.Module) -> int:
    """Any token: the attention mask hides it."""
    config = getattr(model, "config", None)
    return getattr(config, "pad_token_id", None) or 0


def _first(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class _Padded:
    """Examples side by side, the shorter ones filled up."""

    padding: int

    def __call__(self, examples: list[Example]) -> Inputs:
        def side_by_side(rows: list[torch.Tensor], fill: int) -> torch.Tensor:
            return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)

        found = {"input_ids": side_by_side([e.input_ids for e in examples], self.padding),
                 "labels": side_by_side([e.labels for e in examples], IGNORED)}
        if len({len(e.input_ids) for e in examples}) > 1:
            found["attention_mask"] = side_by_side([torch.ones_like(e.input_ids) for e in examples], 0)
        return found


class _Diverged(Exception):
    """The loss, or the norm of the gradient, is not finite."""


class _Trainer(Checkpointed):
    """A trainer with a loss of ours, which stops before the parameters are spoilt."""

    loss: Loss
    compact: bool

    def get_batch_samples(self, *given: Any, **named: Any) -> Any:
        """The batches of a step, and how many tokens are learnt in all of them."""
        batches, _ = super().get_batch_samples(*given, **named)
        return batches, sum(_learnt(batch) for batch in batches)

    def compute_loss(self, model: nn.Module, inputs: Inputs, return_outputs: bool = False,
                     num_items_in_batch: torch.Tensor | int | None = None) -> Any:
        with halved(model) if self.compact else nullcontext():
            loss = self.loss(model, inputs)
        if num_items_in_batch is not None and self.args.gradient_accumulation_steps > 1:
            loss = loss * (_learnt(inputs) / num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: Inputs, prediction_loss_only: bool,
                        ignore_keys: list[str] | None = None) -> tuple[torch.Tensor, None, None]:
        with torch.no_grad():
            return self.loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def training_step(self, *given: Any, **named: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*given, **named)
        if not bool(loss.isfinite()):
            raise _Diverged
        return loss


def _learnt(batch: Inputs) -> torch.Tensor:
    """Tokens that are predicted and counted."""
    return (batch["labels"][:, 1:] != IGNORED).sum()


class _Watch(transformers.TrainerCallback):
    """Tells how far it is, and has a checkpoint written now and then."""

    def __init__(self, save_every: float, total: int, progress: Progress | None):
        self.save_every, self.total, self.progress = save_every, total, progress
        self.saved, self.held = time.monotonic(), ""  # what was measured last, in words

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        slopes = [p.grad for p in model.parameters() if p.grad is not None]
        if slopes and not bool(nn.utils.get_total_norm(slopes).isfinite()):
            raise _Diverged

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if time.monotonic() - self.saved >= self.save_every and state.global_step < self.total:
            control.should_save, self.saved = True, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **more: Any) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            self.held = f", {logs['eval_loss']:.4g} on held-out text"
        if "loss" in logs:
            recent = [h["loss"] for h in state.log_history if "loss" in h][-RECENT:]
            if self.progress:
                self.progress(f"fine-tuning: loss {sum(recent) / len(recent):.4g}{self.held}", state.global_step,
                              self.total)


def write_losses(outcome: Outcome, folder: Path, name: str = "loss") -> None:
    """Leave `loss.json`, and `loss.png` where matplotlib is there."""
    (folder / f"{name}.json").write_text(json.dumps(outcome.to_json(), indent=1) + "\n", encoding="utf-8")
    from fewbits.finetuning.plot import draw

    draw(outcome, folder / f"{name}.png")
