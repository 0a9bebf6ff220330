"""What a model family is, as data: names, row operations, and which file metadata means which configuration entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fewbits.arch.rows import AddOne, Ops

Config = dict[str, Any]
Values = dict[str, Any]


@dataclass(frozen=True)
class Weight:
    """A row of a family's table. `{i}` stands for the layer; `ops` and `present` are asked with the configuration."""

    hf: str
    gguf: str
    role: str  # token_embd, output, attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down, norm, bias
    ops: Callable[[Config], Ops] = lambda config: ()
    present: Callable[[Config], bool] = lambda config: True


@dataclass(frozen=True)
class Tensor:
    """One tensor of one model: its names on both sides, what it is for, and the way between."""

    hf: str
    gguf: str
    role: str
    layer: int | None
    ops: Ops


@dataclass(frozen=True)
class Field:
    """A configuration entry that GGUF metadata holds under `<architecture>.<key>`."""

    key: str
    hf: str
    type: str  # GGUF's name of the value type: "UINT32", "FLOAT32", "BOOL"
    default: Callable[[Config], Any] | None = None  # used where the configuration leaves it out
    required: bool = True


@dataclass(frozen=True)
class Architecture:
    """A model family. `extra_metadata` and `extra_config` map what a table of fields cannot say."""

    name: str
    gguf: str
    architectures: tuple[str, ...]  # Transformers class names; the first is written
    model_types: tuple[str, ...]  # the first is written
    weights: tuple[Weight, ...]
    fields: tuple[Field, ...]
    constants: Config  # configuration entries of the family that no GGUF file states
    defaults: Config  # what Transformers takes where config.json is silent
    refuse: Callable[[Config], str | None]  # why a configuration does not fit GGUF, or None
    extra_metadata: Callable[[Config], Values]  # configuration -> {key: (type, value)}, keys without the prefix
    extra_config: Callable[[Values], Config]  # metadata without the prefix -> configuration entries


def head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def kv_heads(config: Config) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def tied(config: Config) -> bool:
    return bool(config.get("tie_word_embeddings", False))


def plus_one(config: Config) -> Ops:
    return (AddOne(),)


SIZES = (
    Field("context_length", "max_position_embeddings", "UINT32"),
    Field("embedding_length", "hidden_size", "UINT32"),
    Field("block_count", "num_hidden_layers", "UINT32"),
    Field("feed_forward_length", "intermediate_size", "UINT32"),
    Field("attention.head_count", "num_attention_heads", "UINT32"),
    Field("attention.head_count_kv", "num_key_value_heads", "UINT32", lambda c: c["num_attention_heads"], False),
    Field("attention.layer_norm_rms_epsilon", "rms_norm_eps", "FLOAT32", lambda c: 1e-6),
    Field("attention.key_length", "head_dim", "UINT32", head_dim, False),
)

LAYER = "model.layers.{i}."
MLP = tuple(Weight(LAYER + f"mlp.{part}_proj.weight", f"blk.{{i}}.ffn_{part}.weight", f"ffn_{part}")
            for part in ("gate", "up", "down"))
