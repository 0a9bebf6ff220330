"""From a path in any format to a model that generates."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from fewbits import containers, hub
from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError
from fewbits.memory import available_bytes
from fewbits.runtime.build import empty_model, tokenizer_of
from fewbits.runtime.dispatch import choose
from fewbits.runtime.linear import QEmbedding, QLinear
from fewbits.runtime.places import Places

QUANTIZED = (nn.Linear, Conv1D, nn.Embedding)  # modules that can hold packed weights


def load(model: str | Path | Checkpoint, *, dtype: torch.dtype = torch.float32,
         kernel: str | None = None) -> transformers.PreTrainedModel:
    """An ordinary Transformers model on the weights of `model`, a path in any format or a hub id.

    Quantized matrices become `QLinear` and `QEmbedding` modules; everything else is decoded to `dtype`, experts among
    it: Transformers computes with the experts of a layer in one fused parameter. `kernel` names
    the kernel. By default that is the native one, which rounds activations to bytes; weights that it does not support
    are decoded once where that fits into half of the free memory, else at every product.
    `checkpoint_of(model)` and `tokenizer(model)` give what came with it.

    Raises:
        FewbitsError: nothing readable there, tensors missing or misshapen.
    """
    checkpoint = model if isinstance(model, Checkpoint) else containers.open(hub.locate(model))
    net = empty_model(checkpoint.config, checkpoint.path)
    needed = sum(e.parameters for e in checkpoint.entries.values()) * dtype.itemsize
    without = () if kernel or needed < available_bytes() / 2 else ("decoded",)
    places, rest = Places(net, checkpoint), []
    for entry in checkpoint.entries.values():
        place = places.of(entry)
        if entry.codec.family == "float" or place.leaf != "weight" or not isinstance(place.module, QUANTIZED):
            rest.append(entry)
            continue
        q, owner = entry.load(), place.module
        prepared = choose(q, torch.device("cpu"), kernel, without).prepare(q, dtype)
        name = next(n for n, m in net.named_modules() if m is owner)
        if isinstance(owner, nn.Embedding):
            net.set_submodule(name, QEmbedding(prepared, owner))
        else:
            net.set_submodule(name, QLinear(prepared, owner.bias))
    places.fill(rest, dtype)
    _tie(net)
    missing = [n for n, p in net.named_parameters() if p.is_meta]
    if missing:
        raise FewbitsError(f"{checkpoint.path}: {missing[0]} is missing ({len(missing)} of the model's tensors are)")
    if net.can_generate() and "generation_config.json" in checkpoint.files:
        net.generation_config = _generation_config(checkpoint)
    vars(net)["checkpoint"] = checkpoint
    return net


def checkpoint_of(model: nn.Module) -> Checkpoint:
    """The checkpoint that `load` made the model from."""
    checkpoint: Checkpoint = vars(model)["checkpoint"]
    return checkpoint


def tokenizer(model: nn.Module) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer that came with a loaded model.

    Raises:
        FewbitsError: none did.
    """
    return tokenizer_of(checkpoint_of(model))


def _tie(net: transformers.PreTrainedModel) -> None:
    """Let the head use the embedding's tensor where the file holds only one of the two."""
    embedding = net.get_input_embeddings()
    if isinstance(embedding, QEmbedding):
        for name, module in list(net.named_modules()):
            waits = isinstance(module, nn.Linear) and module.weight.is_meta
            if waits and tuple(module.weight.shape) == tuple(embedding.prepared.shape):
                net.set_submodule(name, QLinear(embedding.prepared, module.bias))
    else:
        net.tie_weights()


def _generation_config(checkpoint: Checkpoint) -> transformers.GenerationConfig:
    return transformers.GenerationConfig.from_dict(json.loads(checkpoint.files["generation_config.json"]))
