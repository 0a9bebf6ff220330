"""What a model family is, as data: names, row operations, and which file metadata means which configuration entry.

Families spell their configuration differently (GPT-2 says `n_embd`). Everything here speaks Llama's spelling; a
family's `spelling` says what it calls an entry, and `arch.complete` and `arch.spelled` translate.

Orientation: every matrix of a Checkpoint is `[..., out, in]`, so codecs, solvers and GGUF see one thing. Some families
hold float weights as `[..., in, out]` in files and modules (GPT-2's `Conv1D`): their rows are marked `transposed`, the
directory turns them on reading and writing, and the loader when it fills a module. Packed weights are `[..., out, in]`
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fewbits.arch.rows import AddOne, Ops
from fewbits.codecs.base import Shape

Config = dict[str, Any]
Values = dict[str, Any]


@dataclass(frozen=True)
class Weight:
    """A row of a family's table. `{i}` stands for the layer; `ops` and `present` are asked with the configuration."""

    hf: str
    gguf: str
    role: str  # a key of DIMS, or bias
    ops: Callable[[Config], Ops] = lambda config: ()
    present: Callable[[Config], bool] = lambda config: True
    dims: tuple[str, ...] = ()  # names of NUMBERS; by default those of its role, of a bias the rows of its weight
    transposed: bool = False  # Transformers' files and modules hold it as `[..., in, out]`
    repeat: str = "num_hidden_layers"  # the configuration entry that counts `{i}`


@dataclass(frozen=True)
class Tensor:
    """One tensor of one model: its names on both sides, what it is for, and the way between."""

    hf: str
    gguf: str
    role: str
    layer: int | None
    ops: Ops
    dims: tuple[str, ...] = ()
    transposed: bool = False

    def shape(self, config: Config) -> Shape:
        """Its shape in a Checkpoint, `[..., out, in]`.

        Raises:
            KeyError: the configuration lacks an entry.
        """
        return tuple(int(NUMBERS[name](config)) for name in self.dims)


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
    spelling: Mapping[str, str] = field(default_factory=dict)  # Llama's name of a configuration entry -> this family's
    base: str = "model."  # the prefix that files of the model without a head leave out
    experts: bool = False  # every layer is a mixture of experts; GGUF calls some such families like their dense kin
    skipped: tuple[str, ...] = ("rotary_emb.inv_freq",)  # ends of names of tensors that follow from the configuration

    @property
    def head(self) -> str | None:
        """Transformers' name of the output head's weight, if the family has one."""
        return next((w.hf for w in self.weights if w.role == "output"), None)


def head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def kv_heads(config: Config) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def inner(config: Config) -> int:
    """Width of the feed-forward part; GPT-2's configurations may leave it out."""
    return int(config["intermediate_size"] if "intermediate_size" in config else 4 * config["hidden_size"])


def tied(config: Config) -> bool:
    return bool(config.get("tie_word_embeddings", False))


def untied(config: Config) -> bool:
    return not tied(config)


def plus_one(config: Config) -> Ops:
    return (AddOne(),)


def no_values(config: Config) -> Values:
    """`extra_metadata` and `extra_config` of a family whose table of fields says all."""
    return {}


# the numbers that shapes are made of, by name
NUMBERS: dict[str, Callable[[Config], int]] = {
    "vocab": lambda c: c["vocab_size"], "hidden": lambda c: c["hidden_size"], "inner": inner,
    "positions": lambda c: c["max_position_embeddings"], "types": lambda c: c["type_vocab_size"],
    "head": head_dim, "queries": lambda c: c["num_attention_heads"] * head_dim(c),
    "keys": lambda c: kv_heads(c) * head_dim(c),
    "qkv": lambda c: (c["num_attention_heads"] + 2 * kv_heads(c)) * head_dim(c),
    "gate_up": lambda c: 2 * inner(c), "heads": lambda c: c["num_attention_heads"],
    "experts": lambda c: c["num_local_experts"],
    "expert_inner": lambda c: c.get("moe_intermediate_size") or inner(c),
}
# what a role's tensors measure, where their row does not say
DIMS: dict[str, tuple[str, ...]] = {
    "token_embd": ("vocab", "hidden"), "output": ("vocab", "hidden"), "position_embd": ("positions", "hidden"),
    "attn_q": ("queries", "hidden"), "attn_k": ("keys", "hidden"), "attn_v": ("keys", "hidden"),
    "attn_qkv": ("qkv", "hidden"), "attn_output": ("hidden", "queries"), "ffn_gate": ("inner", "hidden"),
    "ffn_up": ("inner", "hidden"), "ffn_down": ("hidden", "inner"), "norm": ("hidden",),
    "ffn_gate_inp": ("experts", "hidden"), "attn_sinks": ("heads",),
}


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

HEAD_SIZES = tuple(f for f in SIZES if f.hf != "head_dim")  # of families whose heads are hidden_size / heads wide
PLAIN_SIZES = tuple(f for f in HEAD_SIZES if f.hf not in ("rms_norm_eps", "num_key_value_heads"))  # before Llama

EXPERT_COUNTS = (Field("expert_count", "num_local_experts", "UINT32"),
                 Field("expert_used_count", "num_experts_per_tok", "UINT32"))

LAYER = "model.layers.{i}."
MLP = tuple(Weight(LAYER + f"mlp.{part}_proj.weight", f"blk.{{i}}.ffn_{part}.weight", f"ffn_{part}")
            for part in ("gate", "up", "down"))


def expert_weights(hf: str, gate: str, down: str, up: str) -> tuple[Weight, ...]:
    """The rows of a layer's experts, stacked; `{part}` of `hf` stands for the family's name of a projection."""
    wide, narrow = ("experts", "expert_inner", "hidden"), ("experts", "hidden", "expert_inner")
    parts = (("down", down, narrow), ("gate", gate, wide), ("up", up, wide))
    return tuple(Weight(hf.replace("{part}", name), f"blk.{{i}}.ffn_{part}_exps.weight", f"ffn_{part}", dims=dims)
                 for part, name, dims in parts)
