"""From a configuration to a Transformers model without weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


VERSION = f"is not known to transformers {transformers.__version__}"


def settings(config: dict[str, Any], source: str | Path = "config.json",
             trust_remote_code: bool = False) -> transformers.PreTrainedConfig:
    """A config.json as Transformers reads it, what it leaves out filled in.

    Raises:
        FewbitsError: Transformers doesn't know the model type, or it is code that comes with the model, which is run
            with `trust_remote_code` only; `source` is named.
    """
    own = {k: v for k, v in config.items() if k != "quantization_config"}
    try:
        return transformers.AutoConfig.for_model(**own)
    except (KeyError, TypeError, ValueError) as error:
        first = str(error).splitlines()[0]
    code = _code(config, "AutoConfig")
    if code is None:
        raise FewbitsError(f"{source}: model_type {config.get('model_type')!r} {VERSION}: {first}",
                           "a newer transformers may") from None
    kind = _remote(code, source, trust_remote_code)
    found: transformers.PreTrainedConfig = kind.from_dict(own)
    return found


def empty_model(config: dict[str, Any], source: str | Path = "config.json",
                trust_remote_code: bool = False) -> transformers.PreTrainedModel:
    """The model of a config.json, its parameters without memory; buffers are real. In evaluation mode.

    Raises:
        FewbitsError: Transformers doesn't know it, or it is code that comes with the model; `source` is named.
    """
    from accelerate import init_empty_weights

    named = config.get("architectures") or []
    found = settings(config, source, trust_remote_code)
    kind: Any = getattr(transformers, named[0], None) if named else transformers.AutoModel
    if kind is None:
        code = _code(config, named[0])
        if code is None:
            raise FewbitsError(f"{source}: architecture {named[0]!r} {VERSION}",
                               "without its model class nobody knows which tensors are linear layers")
        kind = _remote(code, source, trust_remote_code)
    found.dtype = torch.float32
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(found) if kind is transformers.AutoModel else kind(found)
    return model.eval()


def _code(config: dict[str, Any], wanted: str) -> str | None:
    """Where config.json says that a class is, in code beside it: `modeling_x.XForCausalLM`."""
    listed = config.get("auto_map")
    found = listed if isinstance(listed, dict) else {}
    named = [v[0] if isinstance(v, list) else v for k, v in found.items() if k == wanted]
    named += [v for v in found.values() if isinstance(v, str) and v.rpartition(".")[2] == wanted]
    return next((v for v in named if isinstance(v, str)), None)


def _remote(code: str, source: str | Path, trusted: bool) -> Any:
    if not trusted:
        raise FewbitsError(f"{source}: its model is code of its own ({code}), which is not run unasked",
                           "read that code; trust_remote_code=True runs it")
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    return get_class_from_dynamic_module(code, str(folder))


def block_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The lists of blocks that a model runs through, with the prefix of their names.

    Lists inside of blocks are none, nor are lists of bare linear layers (heads).

    Raises:
        FewbitsError: the model has no such list.
    """
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(prefix) for prefix, _ in found)
        if not isinstance(module, nn.ModuleList) or inside or any(map(is_linear, module)):
            continue
        if any(map(is_linear, module.modules())):
            found.append((name + ".", module))
    if not found:
        raise FewbitsError(f"{type(model).__name__} has no list of blocks to walk", "use --solver search")
    return found


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
