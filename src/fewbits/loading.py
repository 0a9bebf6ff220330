"""From a path in any format to a model that generates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import nn

from fewbits import containers, hub, zeroshot
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.floats import BF16, F16
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError
from fewbits.memory import available_bytes
from fewbits.notes import tell
from fewbits.qtensor import QTensor
from fewbits.recipe import ModelFacts, Overrides, Recipe
from fewbits.runtime.build import empty_model, tokenizer_of
from fewbits.runtime.cpu import OUTLIER
from fewbits.runtime.dispatch import choose
from fewbits.runtime.floats import Floats
from fewbits.runtime.linear import QEmbedding, QLinear, holds_packed, packed
from fewbits.runtime.places import Place, Places
from fewbits.runtime.reference import Prepared
from fewbits.runtime.shown import show_types


def load(model: str | Path | Checkpoint, *, recipe: str | Recipe | None = None, skip: Sequence[str] = (),
         overrides: Overrides = None, solver: str | None = None, dtype: torch.dtype = torch.float32,
         kernel: str | None = None, outliers: float | None = None, trust_remote_code: bool = False,
         progress: Progress | None = None) -> transformers.PreTrainedModel:
    """An ordinary Transformers model on the weights of `model`, a path in any format or a hub id.

    Quantized matrices become `QLinear` and `QEmbedding` modules; everything else is decoded to `dtype`, experts among
    it: Transformers computes with the experts of a layer in one fused parameter. Beside quantized layers, embeddings
    and output heads of 16 bits stay in their file's type.

    `recipe` quantizes while loading, tensor by tensor and without calibration text (`solver` search or nearest), but
    not the modules that `skip` names. What is not as asked is told in a warning.

    `kernel` names the kernel. By default that is the native one, which rounds activations to bytes; weights that it
    does not support are decoded once where that fits into half of the free memory, else at every product. In int8
    layers columns of activations that reach `outliers` are multiplied in floating point (0: none are; by default what
    the file says, else 6).

    The model saves itself in a layout of quantized weights (`save_pretrained`). `checkpoint_of(model)` and
    `tokenizer(model)` give what came with it.

    Raises:
        FewbitsError: nothing readable there, tensors missing or misshapen, a recipe that the model cannot take, a model
            class that is code in its repository.
    """
    checkpoint = model if isinstance(model, Checkpoint) else containers.open(hub.locate(model, code=trust_remote_code))
    net = empty_model(checkpoint.config, checkpoint.path, trust_remote_code)
    places = Places(net, checkpoint)
    if recipe is not None:
        wish = zeroshot.Wish(recipe, skip, overrides, solver)
        checkpoint = _quantizing(checkpoint, wish, net, places)
    needed = sum(e.parameters for e in checkpoint.entries.values()) * dtype.itemsize
    outliers = threshold(outliers, checkpoint)
    without = () if kernel or needed < available_bytes() / 2 else ("decoded",)
    names = {module: name for name, module in net.named_modules()}
    quantized, rest, done, total = False, [], 0, checkpoint.nbytes
    for entry in checkpoint.entries.values():
        place = places.of(entry)
        if entry.codec.family == "float" or not _holds(place):
            rest.append((entry, place))
            continue
        prepared = prepare(entry.load(), dtype, kernel, without, outliers)
        net.set_submodule(names[place.module], packed(prepared, place.module))
        quantized, done = True, done + entry.nbytes
        if progress:
            progress("loading", done, total)
    stored = [(e, p) for e, p in rest if quantized and _stays(e, p, net, dtype)]
    for entry, place in stored:
        net.set_submodule(names[place.module], packed(Floats().prepare(entry.load(), dtype), place.module))
    places.fill([e for e, p in rest if (e, p) not in stored], dtype)
    places.fill_scalars(dtype)
    tie(net)
    show_types(net, dtype)
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


def prepare(q: QTensor, dtype: torch.dtype, kernel: str | None = None, without: tuple[str, ...] = (),
            outliers: float = OUTLIER) -> Prepared:
    """A weight ready to multiply, by the first kernel that supports it."""
    prepared = choose(q, torch.device("cpu"), kernel, without).prepare(q, dtype)
    if q.codec.family == "int8":
        vars(prepared)["outliers"] = outliers or None
    return prepared


def threshold(asked: float | None, checkpoint: Checkpoint | None) -> float:
    """From which magnitude on activations of int8 layers are outliers: what was asked, or what the file says."""
    if asked is not None:
        return asked
    described = checkpoint.facts.get("quantization_config") if checkpoint else None
    return float((described or {}).get("llm_int8_threshold", OUTLIER))


def tie(net: transformers.PreTrainedModel) -> None:
    """Let the head use the embedding's tensor where the file holds only one of the two."""
    embedding = _embeddings(net)
    if not isinstance(embedding, QEmbedding):
        net.tie_weights()
        return
    for name, module in list(net.named_modules()):
        waits = isinstance(module, nn.Linear) and (module.weight.is_meta or module.weight is embedding.weight)
        if waits and (module.out_features, module.in_features) == tuple(embedding.prepared.shape):
            net.set_submodule(name, QLinear(embedding.prepared, module.bias))


def _quantizing(checkpoint: Checkpoint, wish: zeroshot.Wish, net: transformers.PreTrainedModel,
                places: Places) -> Checkpoint:
    """The checkpoint whose tensors become what the wish says when they are loaded."""
    def held(name: str) -> bool:
        return name in checkpoint.entries and _holds(places.of(checkpoint.entries[name]))

    plan = zeroshot.plan(wish, ModelFacts.of(checkpoint, net), net, held)
    tell(plan.notes)
    return zeroshot.apply(checkpoint, plan)


def _holds(place: Place) -> bool:
    """Whether the module at a place has a form with a packed weight."""
    return place.leaf == "weight" and holds_packed(place.module)


def _stays(entry: Entry, place: Place, net: transformers.PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether an embedding or a head stays in its file's 16 bits."""
    plain = type(place.module) in (nn.Linear, nn.Embedding) or hasattr(place.module, "embed_scale")
    ends = place.module in (net.get_output_embeddings(), _embeddings(net))
    return ends and plain and _holds(place) and entry.codec in (F16, BF16) and dtype.itemsize > 1


def _embeddings(net: transformers.PreTrainedModel) -> nn.Module | None:
    """Those of words; models of sound or of several parts have none that Transformers knows of."""
    try:
        return net.get_input_embeddings()
    except NotImplementedError:
        return None


def _generation_config(checkpoint: Checkpoint) -> transformers.GenerationConfig:
    return transformers.GenerationConfig.from_dict(json.loads(checkpoint.files["generation_config.json"]))
