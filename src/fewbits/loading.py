"""From a path in any format to a model that generates."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from accelerate.hooks import add_hook_to_module
from torch import nn

from fewbits import containers, hub, planning, zeroshot
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.floats import BF16, F16
from fewbits.containers.base import Progress
from fewbits.devices import free_bytes
from fewbits.errors import FewbitsError, NotHere
from fewbits.memory import gb
from fewbits.notes import tell
from fewbits.recipe import ModelFacts, Overrides, Recipe
from fewbits.runtime.build import empty_model, tokenizer_of
from fewbits.runtime.cpu import OUTLIER
from fewbits.runtime.dispatch import moved, prepare, prepared_bytes
from fewbits.runtime.floats import Floats
from fewbits.runtime.linear import QEmbedding, QLinear, holds_packed, packed
from fewbits.runtime.places import Place, Places
from fewbits.runtime.placing import Map, Placing, Sizes, placing, settle, short, wanted_gpu
from fewbits.runtime.shown import show_types

CPU = torch.device("cpu")


def load(model: str | Path | Checkpoint, *, recipe: str | Recipe | None = None, skip: Sequence[str] = (),
         overrides: Overrides = None, solver: str | None = None, device: str | torch.device | None = None,
         device_map: Map | None = None, dtype: torch.dtype | None = None, kernel: str | None = None,
         outliers: float | None = None, trust_remote_code: bool = False,
         progress: Progress | None = None) -> transformers.PreTrainedModel:
    """An ordinary Transformers model on the weights of `model`, a path in any format or a hub id.

    Quantized matrices become `QLinear` and `QEmbedding` modules; everything else is decoded to `dtype` (by default
    float32, on a GPU bfloat16), experts among it: Transformers computes with the experts of a layer in one fused
    parameter. Beside quantized layers, embeddings and output heads of 16 bits stay in their file's type.

    It lies on `device`: the CPU by default, `cuda`, `cuda:1`; `auto` is the GPU if there is one. `device_map` shares it
    out between devices, as Transformers': `auto`, `balanced`, or the device of each part.

    `recipe` quantizes while loading, tensor by tensor and without calibration text (`solver` search or nearest), but
    not the modules that `skip` names. What is not as asked is told in a warning.

    `kernel` names the kernel. By default that is, on the CPU, the native one, which rounds activations to bytes;
    weights that a device's own kernel does not support are decoded once where that fits into half of the free memory,
    else at every product. In int8
    layers columns of activations that reach `outliers` are multiplied in floating point (0: none are; by default what
    the file says, else 6).

    The model saves itself in a layout of quantized weights (`save_pretrained`). `checkpoint_of(model)` and
    `tokenizer(model)` give what came with it.

    Raises:
        FewbitsError: nothing readable there, tensors missing or misshapen, a recipe that the model cannot take, a model
            class that is code in its repository, no such device or too little memory on it.
    """
    checkpoint = model if isinstance(model, Checkpoint) else containers.open(hub.locate(model, code=trust_remote_code))
    net = empty_model(checkpoint.config, checkpoint.path, trust_remote_code)
    places = Places(net, checkpoint)
    source = checkpoint
    if recipe is not None:
        wish = zeroshot.Wish(recipe, skip, overrides, solver)
        checkpoint = _quantizing(checkpoint, wish, net, places, lambda name: placed.of(name))
    gpu = wanted_gpu(device, device_map)
    dtype = dtype or (torch.bfloat16 if gpu else torch.float32)
    located = [(entry, places.of(entry)) for entry in checkpoint.entries.values()]
    quantized = [(e, p) for e, p in located if e.codec.family != "float" and _holds(p)]
    rest = [(e, p) for e, p in located if e.codec.family == "float" or not _holds(p)]
    stored = [(e, p) for e, p in rest if quantized and _stays(e, p, net, dtype)]
    decoded = [(e, p) for e, p in rest if (e, p) not in stored]
    sizes = Sizes.of([(places.name(p), prepared_bytes(e, gpu or CPU, dtype, kernel)) for e, p in quantized]
                     + [(places.name(p), e.nbytes) for e, p in stored]
                     + [(places.name(p), e.parameters * dtype.itemsize) for e, p in decoded])
    placed = placing(net, device, device_map, sizes)
    _check_room(placed, sizes, source)
    floats = Sizes.of([(places.name(p), e.parameters * dtype.itemsize) for e, p in located])
    without = {d: () if kernel or floats.on(d, placed) < free_bytes(d) / 2 else ("decoded",) for d in placed.devices}
    outliers = threshold(outliers, checkpoint)
    done, total = 0, checkpoint.nbytes
    for entry, place in quantized:
        where = placed.of(places.name(place))
        prepared = prepare(entry.load(), where, dtype, kernel, without[where], outliers)
        net.set_submodule(places.owner(place), packed(prepared, place.module))
        done += entry.nbytes
        if progress:
            progress("loading", done, total)
    for entry, place in stored:
        kept = Floats().prepare(entry.load().to(placed.of(places.name(place))), dtype)
        net.set_submodule(places.owner(place), packed(kept, place.module))
    places.fill([e for e, _ in decoded], dtype, placed)
    places.fill_scalars(dtype)
    tie(net, placed, kernel)
    show_types(net, dtype)
    settle(net, placed)
    missing = [n for n, p in net.named_parameters() if p.is_meta]
    if missing:
        raise FewbitsError(f"{checkpoint.path}: {missing[0]} is missing ({len(missing)} of the model's tensors are)")
    if net.can_generate() and "generation_config.json" in checkpoint.files:
        net.generation_config = _generation_config(checkpoint)
    vars(net)["checkpoint"] = checkpoint
    if quantized:
        from fewbits.hf.quantizer import attach

        attach(net)
    return net


def checkpoint_of(model: nn.Module) -> Checkpoint:
    """The checkpoint that `load` made the model from.

    Raises:
        FewbitsError: Transformers made it.
    """
    checkpoint: Checkpoint | None = vars(model).get("checkpoint")
    if checkpoint is None:
        raise FewbitsError(f"{type(model).__name__}: not from fewbits.load", "whoever loaded it knows where it is")
    return checkpoint


def tokenizer(model: nn.Module) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer that came with a loaded model.

    Raises:
        FewbitsError: none did.
    """
    return tokenizer_of(checkpoint_of(model))


def threshold(asked: float | None, checkpoint: Checkpoint | None) -> float:
    """From which magnitude on activations of int8 layers are outliers: what was asked, or what the file says."""
    if asked is not None:
        return asked
    described = checkpoint.facts.get("quantization_config") if checkpoint else None
    return float((described or {}).get("llm_int8_threshold", OUTLIER))


def tie(net: transformers.PreTrainedModel, placed: Placing, kernel: str | None = None) -> None:
    """Let the head use the embedding's tensor where the file holds only one of the two; on another device, a copy."""
    embedding = _embeddings(net)
    if not isinstance(embedding, QEmbedding):
        net.tie_weights()
        return
    for name, module in list(net.named_modules()):
        waits = isinstance(module, nn.Linear) and (module.weight.is_meta or module.weight is embedding.weight)
        if waits and (module.out_features, module.in_features) == tuple(embedding.prepared.shape):
            head = QLinear(moved(embedding.prepared, placed.of(name), kernel), module.bias)
            if hasattr(module, "_hf_hook"):
                add_hook_to_module(head, module._hf_hook)
            net.set_submodule(name, head)


def _quantizing(checkpoint: Checkpoint, wish: zeroshot.Wish, net: transformers.PreTrainedModel,
                places: Places, where: Callable[[str], torch.device]) -> Checkpoint:
    """The checkpoint whose tensors become what the wish says when they are loaded, on the device that they go to."""
    def held(name: str) -> bool:
        return name in checkpoint.entries and _holds(places.of(checkpoint.entries[name]))

    plan = zeroshot.plan(wish, ModelFacts.of(checkpoint, net), net, held)
    tell(plan.notes)
    return zeroshot.apply(checkpoint, plan, lambda name: where(places.name(places.of(checkpoint.entries[name]))))


def _holds(place: Place) -> bool:
    """Whether the module at a place has a form with a packed weight."""
    return place.leaf == "weight" and holds_packed(place.module)


def _stays(entry: Entry, place: Place, net: transformers.PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether an embedding or a head stays in its file's 16 bits."""
    plain = type(place.module) in (nn.Linear, nn.Embedding) or hasattr(place.module, "embed_scale")
    ends = place.module in (net.get_output_embeddings(), _embeddings(net))
    return ends and plain and _holds(place) and entry.codec in (F16, BF16) and dtype.itemsize > 1


def _check_room(placed: Placing, sizes: Sizes, source: Checkpoint) -> None:
    """
    Raises:
        NotHere: the weights don't fit into a GPU; the hint says what would.
    """
    lack = short(placed, sizes)
    if lack is None:
        return
    device, needed, free = lack
    hint = 'device_map="auto" leaves on the CPU what the GPU has no room for'
    fitting = planning.fitting(source, free)
    if fitting:
        hint = f"{', '.join(fitting)} would fit, with 4096 tokens; {hint}"
    raise NotHere(f"{device}: {gb(needed)} are needed for the weights, {gb(free)} are free", hint)


def _embeddings(net: transformers.PreTrainedModel) -> nn.Module | None:
    """Those of words; models of sound or of several parts have none that Transformers knows of."""
    try:
        return net.get_input_embeddings()
    except NotImplementedError:
        return None


def _generation_config(checkpoint: Checkpoint) -> transformers.GenerationConfig:
    return transformers.GenerationConfig.from_dict(json.loads(checkpoint.files["generation_config.json"]))
