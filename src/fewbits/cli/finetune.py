"""`fewbits finetune MODEL --data FILE -o ADAPTER`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbits.cli.common import Device, console, emit, log, progress, quiet_libraries
from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.finetuning import Finetuned, Trained


def command(
    model: Annotated[str, typer.Argument(help="A model in any format, quantized or not, or a hub id.")],
    data: Annotated[str, typer.Option(
        help="A text file, a .jsonl of texts, pairs or chats, or a data set of the hub as owner/name:split.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The adapter's directory; with --qat the model's.")],
    base: Annotated[str | None, typer.Option(
        help="Train on the model quantized so on loading: nf4, int8, Q4_K_M, …; with --deploy nf4, or none.")] = None,
    epochs: Annotated[float, typer.Option(min=0, help="Times that the data are gone through.")] = 1.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the optimizer, instead of --epochs.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples at a time.")] = 4,
    accumulation: Annotated[int, typer.Option(min=1, help="Batches a step.")] = 1,
    length: Annotated[int, typer.Option(min=2, help="Tokens of an example, at most.")] = 512,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter.")] = 16,
    alpha: Annotated[int, typer.Option(help="What the adapter adds is times alpha / rank.")] = 32,
    dropout: Annotated[float, typer.Option(min=0, max=1, help="Of what the adapter reads.")] = 0.0,
    targets: Annotated[str, typer.Option(help="Layers that are adapted: all-linear, or ends of names: q_proj,v_proj.")]
    = "all-linear",
    adapter: Annotated[Path | None, typer.Option(help="An adapter to go on from.")] = None,
    rate: Annotated[float | None, typer.Option(help="Largest learning rate: 0.0002; with --qat in levels of the codec, "
                                                    "0.002.")] = None,
    schedule: Annotated[str, typer.Option(help="How the rate falls: cosine, linear, constant, …")] = "cosine",
    warm_up: Annotated[float | None, typer.Option(min=0, max=1, help="Share of the steps in which the rate rises: "
                                                                     "0.03; with --qat 0.1.")] = None,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of the adapter.")] = 0.0,
    optimizer: Annotated[str | None, typer.Option(
        help="By Transformers' names: adamw_torch, adafactor; adamw_torch_8bit, paged_adamw_8bit, … need a library. "
             "adamw_torch; with --qat adamw_torch_fused.")] = None,
    dtype: Annotated[str, typer.Option(help="Of activations: float32 or bfloat16.")] = "float32",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory: compute activations twice.")] =
        False,
    held_out: Annotated[float, typer.Option(min=0, max=0.5, help="Share of the data to measure on.")] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Of the adapter's start and the order of the data.")] = 0,
    gguf: Annotated[Path | None, typer.Option(help="Also write the adapter for llama.cpp, to this file.")] = None,
    device: Device = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    qat: Annotated[str | None, typer.Option(
        help="No adapter: train the model as what this recipe makes of it, int3-g64 or Q2_K.")] = None,
    start: Annotated[Path | None, typer.Option(
        help="With --qat: the quantized model to begin at; else it is made, by GPTQ on the data.")] = None,
    container: Annotated[str | None, typer.Option(help="With --qat: another layout than the recipe's own.")] = None,
    distill: Annotated[bool, typer.Option(
        help="With --qat: learn the original's distribution of the next token, not the text's own.")] = True,
    scales: Annotated[str, typer.Option(help="With --qat: learned, refitted or fixed.")] = "learned",
    deploy: Annotated[str | None, typer.Option(
        help="The whole way: OUT is then the model, fine-tuned and quantized by this recipe (int4-g128, Q4_K_M). The "
             "adapter is left in OUT.adapter.")] = None,
    into: Annotated[str, typer.Option(help="With --deploy, what the adapter is merged into: original or base.")] =
        "original",
    calibration: Annotated[str | None, typer.Option(
        help="With --deploy, as for quantize; by default the training data.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Train a LoRA adapter on a model, quantized or not; with --qat the model itself, for few bits."""
    from fewbits.finetuning.adapters import Lora
    from fewbits.finetuning.loop import Settings
    from fewbits.finetuning.lora import finetune
    from fewbits.finetuning.qat import SETTINGS
    from fewbits.finetuning.qat import qat as train_quantized

    quiet_libraries()
    if qat is None and start is not None:
        raise FewbitsError("--start is where --qat begins", "give --qat RECIPE; --adapter is where LoRA begins")
    if qat is not None and device not in (None, "cpu"):
        raise FewbitsError(f"--device {device}: with --qat the CPU computes so far", "leave --device out")
    if qat is not None and (adapter or gguf or deploy):
        raise FewbitsError(f"--qat {qat} makes no adapter", "leave --adapter, --gguf and --deploy out")
    usual = Settings() if qat is None else SETTINGS
    settings = Settings(epochs=epochs, steps=steps, batch=batch, accumulation=accumulation, length=length,
                        rate=usual.rate if rate is None else rate, schedule=schedule,
                        warm_up=usual.warm_up if warm_up is None else warm_up, weight_decay=weight_decay,
                        optimizer=optimizer or usual.optimizer, seed=seed, dtype=dtype, checkpointing=checkpointing,
                        held_out=held_out)
    names = tuple(n for n in targets.split(",") if n)
    lora = Lora(rank, alpha, dropout, names if len(names) > 1 else targets)
    if deploy is not None:
        return _deploy(model, out, deploy, {"adapter": adapter, "gguf": gguf}, json, data=data, base=base or "nf4",
                       into=into, lora=lora, settings=settings, calibration=calibration, device=device)
    found: Finetuned | Trained
    with progress() as report:
        if qat is not None:
            found = train_quantized(model, out, qat, data=data, start=start, container=container, distill=distill,
                                    scales=scales, settings=settings, progress=report)
        else:
            found = finetune(model, out, data=data, recipe=None if base == "none" else base, lora=lora,
                             adapter=adapter, gguf=gguf, settings=settings, device=device,
                             trust_remote_code=trust_remote_code, progress=report)
    if json:
        emit(found.to_json())
        return
    for note in found.notes:
        log.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{out}: {found.summary}", highlight=False, markup=False, soft_wrap=True)


def _deploy(model: str, out: Path, to: str, without: dict[str, Any], as_json: bool, **options: Any) -> None:
    from fewbits.cli.merge import say
    from fewbits.finetuning.deploy import deploy

    for name, value in without.items():
        if value is not None:
            raise FewbitsError(f"--{name} and --deploy: one of them", "take the steps one by one: finetune, then merge")
    with progress() as report:
        found = deploy(model, out, to, progress=report, **options)
    if as_json:
        emit(found.to_json())
        return
    for note in found.notes:
        log.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    say(found.merged)
    console.print(f"adapter in {found.adapter}, trained on {found.trained_on}; {found.seconds:.0f} s in all",
                  highlight=False, markup=False, soft_wrap=True)
