"""A live model with packed weights as the tensors of a model directory, in a layout that Transformers knows if one can
hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from fewbits import containers
from fewbits.checkpoint import Buffer, Checkpoint, Entry
from fewbits.codecs.floats import BF16, F16, F32, Float
from fewbits.containers.base import Container
from fewbits.containers.directory import Directory, turned
from fewbits.containers.safetensors import DTYPES
from fewbits.errors import FewbitsError
from fewbits.hf.config import FewbitsConfig
from fewbits.lazy import transformers
from fewbits.qtensor import QTensor
from fewbits.recipe import CONTAINERS
from fewbits.runtime.linear import QEmbedding, QLinear

FLOATS = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
FILE_DTYPES = {torch_name: name for name, (torch_name, _) in DTYPES.items()}


def state_dict(model: transformers.PreTrainedModel) -> tuple[dict[str, torch.Tensor], FewbitsConfig]:
    """The tensors of the files of a model, and what its config.json says of their layout."""
    checkpoint = checkpoint_of(model)
    before: Checkpoint | None = vars(model).get("checkpoint")
    container = choose(checkpoint, before.container if before else None)
    filed = container.as_filed(checkpoint)
    layout = container.layout(filed)
    found: dict[str, torch.Tensor] = {}
    held: set[int] = set()
    for entry in filed.entries.values():
        for name, tensor in layout.tensors(entry.name, entry.load()).items():
            again = tensor.numel() > 0 and tensor.data_ptr() in held  # tables of levels, one for all layers
            held.add(tensor.data_ptr())
            found[name] = tensor.clone() if again else tensor
    found |= {name: buffer.load() for name, buffer in filed.buffers.items()}
    config = FewbitsConfig()
    config.saved = layout.quantization_config() or {}
    return found, config


def choose(checkpoint: Checkpoint, before: str | None = None) -> Directory:
    """The layout that the model came in, or the first that holds all of its weights; the last holds any.

    Raises:
        FewbitsError: none does.
    """
    families = [e.codec.family for e in checkpoint.entries.values() if not isinstance(e.codec, Float)]
    names = [n for n in (before, *(n for f in families for n in CONTAINERS.get(f, ())), "fewbits") if n]
    reason = ""
    for name in dict.fromkeys(names):
        container: Container = containers.by_name(name)
        if not isinstance(container, Directory):
            continue
        refusal = container.refusal(checkpoint)
        if refusal is None:
            return container
        reason = f"{name} cannot hold {refusal[0].name}: {refusal[1]}"
    raise FewbitsError(f"no directory holds this model: {reason}")


def checkpoint_of(model: transformers.PreTrainedModel) -> Checkpoint:
    """The model as a checkpoint, under the names that its files have."""
    weights = {f"{name}.weight": module for name, module in model.named_modules()
               if isinstance(module, (QLinear, QEmbedding))}
    tied = {id(m.prepared): n for n, m in reversed(weights.items())}  # of an embedding and its head the first
    kept = {n: m for n, m in weights.items() if tied[id(m.prepared)] == n}
    planes = {f"{n.removesuffix('weight')}{b}" for n, m in weights.items() for b, _ in m.named_buffers(recurse=False)}
    state = {n: t for n, t in model.state_dict().items() if n not in weights and n not in planes}
    state = remove_tied_weights_from_state_dict(state, model)
    named = _named(model, state | {n: torch.empty(m.prepared.shape, device="meta") for n, m in kept.items()}, kept)
    config = _config(model)
    entries: dict[str, Entry] = {}
    buffers: dict[str, Buffer] = {}
    for name, value in named.items():
        if isinstance(value, (QLinear, QEmbedding)):
            entries[name] = _packed(name, value)
        elif value.dtype in FLOATS and value.ndim:
            entries[name] = _plain(name, value)
        else:
            dtype = FILE_DTYPES[str(value.dtype).removeprefix("torch.")]
            buffers[name] = Buffer(dtype, tuple(value.shape), value.detach)
    return Checkpoint(Path(model.name_or_path or type(model).__name__), "transformers", config,
                      turned(config, entries), facts={"quantization_config": _described(model, kept)}, buffers=buffers)


def _named(model: Any, state: dict[str, torch.Tensor], packed: dict[str, Any]) -> dict[str, Any]:
    """Values under the names of files; those of the model where files hold a packed weight in other parts."""
    by_id = {id(state[n]): m for n, m in packed.items()}
    found = revert_weight_conversion(model, state)
    if sum(id(v) in by_id for v in found.values()) < len(packed):
        found = state
    return {name: by_id.get(id(value), value) for name, value in found.items()}


def _config(model: transformers.PreTrainedModel) -> dict[str, Any]:
    found = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    return found | {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}


def _described(model: transformers.PreTrainedModel, packed: dict[str, Any]) -> dict[str, Any]:
    """What the configuration said of the weights, and the outliers' threshold that layers have."""
    found = dict(model.config.to_dict().get("quantization_config") or {})
    for module in packed.values():
        if module.prepared.codec.family == "int8":
            found["llm_int8_threshold"] = vars(module.prepared).get("outliers") or 0.0
    return found


def _packed(name: str, module: QLinear | QEmbedding) -> Entry:
    prepared = module.prepared
    return Entry(name, tuple(prepared.shape), prepared.codec, lambda: prepared.q)


def _plain(name: str, value: torch.Tensor) -> Entry:
    codec, shape = FLOATS[value.dtype], tuple(value.shape)
    return Entry(name, shape, codec,
                 lambda: QTensor(codec, shape, {"data": value.detach().reshape(codec.matrix(shape))}))


def unpacked(module: QLinear | QEmbedding, dtype: torch.dtype) -> nn.Module:
    """An ordinary layer on the decoded weight."""
    weight = nn.Parameter(module.q.dequantize(dtype), requires_grad=False)
    made: nn.Linear | nn.Embedding
    if isinstance(module, QEmbedding):
        if module.scale is not None:
            raise FewbitsError("an embedding that scales its rows cannot be decoded in place", "load the original")
        made = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
    else:
        made = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        made.bias = module.bias
    made.weight = weight
    return made
