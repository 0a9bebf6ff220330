"""From a configuration to a Transformers model without weights, and from a checkpoint's entries into it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from fewbits.checkpoint import Checkpoint, Entry
from fewbits.errors import FewbitsError


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def empty_model(config: dict[str, Any], source: str | Path = "config.json") -> transformers.PreTrainedModel:
    """The model of a config.json, its parameters without memory; buffers are real. In evaluation mode.

    Raises:
        FewbitsError: Transformers doesn't know it; `source` is named.
    """
    from accelerate import init_empty_weights

    named = config.get("architectures") or []
    kind: Any = getattr(transformers, named[0], None) if named else transformers.AutoModel
    version = f"is not known to transformers {transformers.__version__}"
    try:
        settings = transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "quantization_config"})
    except (KeyError, TypeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise FewbitsError(f"{source}: model_type {config.get('model_type')!r} {version}: {first}",
                           "a newer transformers may; models with code of their own are not run") from None
    if kind is None:
        raise FewbitsError(f"{source}: architecture {named[0]!r} {version}",
                           "without its model class nobody knows which tensors are linear layers")
    settings.dtype = torch.float32
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(settings) if kind is transformers.AutoModel else kind(settings)
    return model.eval()


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of equal blocks that a model runs through, and the prefix of their parameters' names.

    Raises:
        FewbitsError: the model has no such list.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise FewbitsError(f"{type(model).__name__} has no list of blocks to walk", "use --solver search")
    name, blocks = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    return name + ".", blocks


def place(model: nn.Module, name: str, value: nn.Parameter) -> None:
    """Put a parameter under its dotted name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


def decoded(entry: Entry, module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The entry's values as the module holds them; quantized matrices are `[out, in]`, `Conv1D` wants `[in, out]`."""
    weight = entry.load().dequantize(dtype)
    transposed = isinstance(module, Conv1D) and weight.ndim == 2 and entry.codec.family != "float"
    return weight.T.contiguous() if transposed else weight


def load_floats(model: nn.Module, checkpoint: Checkpoint, names: Iterable[str],
                dtype: torch.dtype = torch.float32) -> None:
    """Decode the entries `names` into the model's parameters and buffers, then tie what the model ties.

    Raises:
        FewbitsError: the model has no such parameter, or one of another shape.
    """
    for name in names:
        entry = checkpoint.entries[name]
        owner, leaf = parameter_of(model, checkpoint, entry)
        value = decoded(entry, owner, dtype)
        if leaf in owner._parameters:
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
        else:
            owner.register_buffer(leaf, value)
    model.tie_weights()  # type: ignore[operator]


def parameter_of(model: nn.Module, checkpoint: Checkpoint, entry: Entry) -> tuple[nn.Module, str]:
    """The module and attribute that an entry belongs to, its shape checked."""
    for name in (entry.name, _renamed(model, entry.name)):
        owner_name, _, leaf = name.rpartition(".")
        try:
            owner = model.get_submodule(owner_name)
            meant = getattr(owner, leaf)
            break
        except AttributeError:
            continue
    else:
        raise FewbitsError(f"{checkpoint.path}: {type(model).__name__} has no parameter {entry.name}")
    shape = tuple(meant.shape)
    if isinstance(owner, Conv1D) and len(shape) == 2 and entry.codec.family != "float":
        shape = shape[::-1]
    if shape != tuple(entry.shape):
        raise FewbitsError(f"{checkpoint.path}: {entry.name} is {list(entry.shape)}, the configuration wants "
                           f"{list(shape)}")
    return owner, leaf


def _renamed(model: nn.Module, name: str) -> str:
    """What Transformers calls a tensor that files know under another name: an older one, or without a prefix."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    assert isinstance(model, transformers.PreTrainedModel)
    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    return rename_source_key(name, renamings, [], model.base_model_prefix, dict(model.named_parameters()))[0]


def tokenizer_of(checkpoint: Checkpoint) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer that a checkpoint carries.

    Raises:
        FewbitsError: it carries none.
    """
    if not any(n in checkpoint.files for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise FewbitsError(f"{checkpoint.path}: no tokenizer in it", "put tokenizer.json beside the weights")
    with tempfile.TemporaryDirectory() as folder:
        for name, data in checkpoint.files.items():
            (Path(folder) / name).write_bytes(data)
        (Path(folder) / "config.json").write_text(json.dumps(checkpoint.config))
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def bos_of(tokenizer: transformers.PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer puts before every text, or None."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None
