"""Configuration and metadata of GGUF files: what config.json says there, and the other way round."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fewbits import arch
from fewbits.arch import Architecture, rope
from fewbits.checkpoint import Checkpoint
from fewbits.containers import gguf_tokenizer
from fewbits.containers.gguf_file import GgufFile, Value
from fewbits.errors import FewbitsError

ROPE_FREQS = "rope_freqs.weight"
LONGROPE = ("rope_factors_long.weight", "rope_factors_short.weight")
DERIVED = (ROPE_FREQS, *LONGROPE)  # tensors that follow from the configuration
INTEGERS = ("UINT32", "INT32", "UINT64", "INT64", "UINT16", "INT16", "UINT8", "INT8")
FLOATS = ("FLOAT32", "FLOAT64")


# reading ------------------------------------------------------------------------------------------------------------
def get(file: GgufFile, key: str, *types: str) -> Any:
    """A metadata value of one of `types`, or None where it is missing."""
    value = file.metadata.get(key)
    if value is None:
        return None
    if value.type not in types:
        raise FewbitsError(f"{file.path}: {key} is of type {value.type}; {' or '.join(types)} is expected")
    return value.value


def family_of(file: GgufFile) -> Architecture:
    name = get(file, "general.architecture", "STRING")
    family = arch.by_gguf(name, experts=bool(get(file, f"{name}.expert_count", *INTEGERS)))
    if family is None:
        known = ", ".join(sorted({a.gguf for a in arch.architectures() if a.gguf}))
        raise FewbitsError(f"{file.path}: general.architecture is {name!r}; there are tables for {known}")
    return family


def config_of(file: GgufFile, family: Architecture) -> dict[str, Any]:
    """Transformers' configuration of what the metadata describe, in Llama's spelling."""
    prefix = f"{family.gguf}."
    values = {k.removeprefix(prefix): v.value for k, v in file.metadata.items() if k.startswith(prefix)}
    config: dict[str, Any] = {"architectures": [family.architectures[0]], "model_type": family.model_types[0]}
    for field in family.fields:
        types = {"FLOAT32": FLOATS, "BOOL": ("BOOL",)}.get(field.type, INTEGERS)
        value = get(file, prefix + field.key, *types)
        if value is None and field.required:
            raise FewbitsError(f"{file.path}: {prefix + field.key} is missing")
        if value is None and field.default is not None:
            value = field.default(config)
        if value is not None:
            config[field.hf] = value
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "num_key_value_heads"):
        if not 1 <= config.get(key, 1) <= 1 << 24:
            raise FewbitsError(f"{file.path}: {key} is {config[key]}")
    if config["num_hidden_layers"] > len(file.tensors):
        raise FewbitsError(f"{file.path}: {prefix}block_count is {config['num_hidden_layers']}, with "
                           f"{len(file.tensors)} tensors in the file")
    if "token_embd.weight" not in file.tensors:
        raise FewbitsError(f"{file.path}: tensor 'token_embd.weight' is missing")
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    for key in ("attention_bias", "mlp_bias"):
        probe = "blk.0.attn_output.bias" if key == "attention_bias" else "blk.0.ffn_down.bias"
        if family.name == "llama":
            config[key] = probe in file.tensors
    config |= family.constants
    try:
        config |= family.extra_config(values)
        if ROPE_FREQS in file.tensors:
            config["rope_parameters"] = _llama3(file, config["rope_parameters"])
        if LONGROPE[0] in file.tensors:
            config["rope_parameters"] |= _longrope(file, values)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise FewbitsError(f"{file.path}: {error}") from None
    for name, key in gguf_tokenizer.SPECIAL.items():
        found = get(file, gguf_tokenizer.KEY + key, *INTEGERS)
        if name in ("bos_token", "eos_token", "pad_token"):
            config[f"{name}_id"] = found
    kinds = {s.type for s in file.tensors.values() if len(s.shape) > 1}
    for kind, dtype in (("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16")):
        if kinds <= {kind, "F32"}:  # routers are in float32
            config.setdefault("dtype", dtype)
    config.setdefault("dtype", "float16")
    reason = family.refuse(config)
    if reason:
        raise FewbitsError(f"{file.path}: Transformers' {family.name} is no such model: {reason}")
    return config


def _llama3(file: GgufFile, settings: dict[str, Any]) -> dict[str, Any]:
    return rope.llama3_from_factors(_factors(file, ROPE_FREQS), settings["rope_theta"])


def _longrope(file: GgufFile, values: dict[str, Any]) -> dict[str, Any]:
    long, short = (_factors(file, name) for name in LONGROPE)
    return rope.longrope(values, long, short)


def _factors(file: GgufFile, name: str) -> list[float]:
    spec = file.tensors.get(name)
    if spec is None:
        raise ValueError(f"{name} is missing")
    if spec.type != "F32" or len(spec.shape) != 1:
        raise ValueError(f"{name} is {spec.type} {list(spec.shape)}; a float32 vector is expected")
    found: list[float] = file.data(spec).view(np.float32).tolist()
    return found


# writing ------------------------------------------------------------------------------------------------------------
def own_config(family: Architecture, checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration in Llama's spelling with defaults filled in; the tensors say whether the head is tied.

    Raises:
        FewbitsError: an entry that every configuration of the family has is missing.
    """
    config = arch.complete(family, checkpoint.config, checkpoint.entries)
    for field in family.fields:
        if field.required and field.default is None and not isinstance(config.get(field.hf), (int, float)):
            theirs = family.spelling.get(field.hf, field.hf)
            raise FewbitsError(f"{checkpoint.path}: config.json has {theirs} = {config.get(field.hf)!r}")
    return config


def derived(family: Architecture, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Tensors of a GGUF file that follow from the configuration: rotary frequencies' divisors."""
    settings = rope.parameters(config, "full_attention" if config.get("layer_types") else "")
    if settings["rope_type"] == "llama3":
        return {ROPE_FREQS: np.array(rope.llama3_factors(settings, arch.head_dim(config)), np.float32)}
    if settings["rope_type"] == "longrope":
        both = settings["long_factor"], settings["short_factor"]
        return {name: np.array(factors, np.float32) for name, factors in zip(LONGROPE, both, strict=True)}
    return {}


def metadata(checkpoint: Checkpoint) -> dict[str, Value]:
    """All metadata: what the file came with, where it was GGUF, else made from configuration and tokenizer."""
    family = arch.lookup(checkpoint.config)
    assert family is not None
    config = own_config(family, checkpoint)
    kept: dict[str, Value] = dict(checkpoint.facts.get("metadata") or {})
    kept.pop("general.alignment", None)
    out = {"general.architecture": Value("STRING", str(family.gguf))}
    if "general.name" not in kept:
        name = checkpoint.facts.get("name") or str(config.get("_name_or_path") or checkpoint.path.stem)
        out |= {"general.type": Value("STRING", "model"), "general.name": Value("STRING", Path(name).name)}
    for field in family.fields:
        value = config.get(field.hf)
        if value is None and field.default is not None:
            value = field.default(config)
        if value is not None:
            out[f"{family.gguf}.{field.key}"] = Value(field.type, value)
    out |= {f"{family.gguf}.{k}": Value(*v) for k, v in family.extra_metadata(config).items()}
    if gguf_tokenizer.KEY + "model" not in kept:
        embedding = checkpoint.entries[next(w.hf for w in family.weights if w.role == "token_embd")].shape[0]
        try:
            named = str((out | kept)["general.name"].value)
            tokenizer = gguf_tokenizer.to_metadata(checkpoint.files, config, embedding, named)
        except FewbitsError as error:
            raise FewbitsError(f"{checkpoint.path}: {error}", error.hint) from None
        if tokenizer[gguf_tokenizer.KEY + "model"].value == "no_vocab":
            out[f"{family.gguf}.vocab_size"] = Value("UINT32", embedding)
        out |= tokenizer
    from gguf.constants import GGML_QUANT_VERSION

    out["general.quantization_version"] = Value("UINT32", GGML_QUANT_VERSION)
    out["general.file_type"] = Value("UINT32", _file_type(checkpoint))
    return kept | {k: v for k, v in out.items() if k not in kept or not _same(kept[k], v)}


def _same(kept: Value, new: Value) -> bool:
    """Whether a value is kept with the type it came in."""
    if kept.type == "ARRAY" or new.type == "ARRAY":
        return False
    return bool(kept.value == new.value) or (kept.type == "FLOAT32" and np.float32(kept.value) == np.float32(new.value))


def _file_type(checkpoint: Checkpoint) -> int:
    """`general.file_type`: what the recipe says, else by the type that holds most weights."""
    from gguf.constants import LlamaFileType

    if checkpoint.facts.get("file_type") is not None:
        return int(checkpoint.facts["file_type"])
    weights: Counter[str] = Counter()
    for entry in checkpoint.entries.values():
        if len(entry.shape) > 1:
            weights[entry.codec.name] += entry.parameters
    kind = weights.most_common(1)[0][0]
    names = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M",
             "MXFP4": "MOSTLY_MXFP4_MOE"}
    name = names.get(kind, f"MOSTLY_{kind}")
    return int(LlamaFileType[name]) if name in LlamaFileType.__members__ else int(LlamaFileType.GUESSED)
