"""Where a scale can move through a model: which tensor's outputs are the inputs of which layers, and of nothing else.

Outputs of the producer divided by a scale, columns of every consumer multiplied by it: the same function. That holds
for a norm before linear layers, for values through attention (which averages them channel by channel), for the linear
half of a gated feed-forward part, and through a ReLU. It does not hold for what feeds the residual stream. Experts' own
products are left out: every expert would want a scale of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fewbits import arch
from fewbits.arch.base import LAYER, Config, head_dim, inner, kv_heads
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.errors import FewbitsError
from fewbits.lazy import torch


@dataclass(frozen=True)
class Row:
    """A row of a family's table; names below the layer, without `.weight`."""

    producer: str  # its bias goes with it
    consumers: str  # words
    rows: Callable[[Config], torch.Tensor] | None = None  # those of Site; None: all, one after the other
    add_one: bool = False
    present: Callable[[Config], bool] = lambda config: True


@dataclass(frozen=True, eq=False)
class Site:
    """A row of the table in one layer of one model."""

    producer: str
    bias: str | None
    consumers: tuple[str, ...]
    rows: torch.Tensor  # [in of the consumers]: which output of the producer each of their inputs is
    add_one: bool  # the producer is a norm that multiplies by 1 + w


def _heads(config: Config, first: int = 0, stride: int = 1) -> torch.Tensor:
    """From values to attention's output. The heads of values begin at row `first`, `stride` heads apart.

    With grouped queries several heads of the output read the same values, and so share a scale.
    """
    heads, width = config["num_attention_heads"], head_dim(config)
    column = torch.arange(heads * width)
    group = column // width // (heads // kv_heads(config))
    return first + group * stride * width + column % width


def _after_queries_and_keys(config: Config) -> torch.Tensor:
    return _heads(config, (config["num_attention_heads"] + kv_heads(config)) * head_dim(config))


def _third_of_every_head(config: Config) -> torch.Tensor:
    return _heads(config, 2 * head_dim(config), stride=3)


def _second_half(config: Config) -> torch.Tensor:
    return inner(config) + torch.arange(inner(config))


def _norm_first(config: Config) -> bool:
    return bool(config.get("do_layer_norm_before", True))


def _relu(config: Config) -> bool:
    return config.get("activation_function", "relu") == "relu"


QKV, GATE_UP = "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "mlp.gate_proj mlp.up_proj"
VALUES, UP = Row("self_attn.v_proj", "self_attn.o_proj", _heads), Row("mlp.up_proj", "mlp.down_proj")
LLAMA = (Row("input_layernorm", QKV), Row("post_attention_layernorm", GATE_UP), VALUES, UP)
GEMMA = (Row("input_layernorm", QKV, add_one=True), Row("pre_feedforward_layernorm", GATE_UP, add_one=True), VALUES, UP)
ROUTED = "block_sparse_moe."

# family -> what names of a layer begin with, and its rows. The router of experts reads what they read
TABLES: dict[str, tuple[str, tuple[Row, ...]]] = {
    "llama": (LAYER, LLAMA),
    "qwen2": (LAYER, LLAMA),
    "qwen3": (LAYER, LLAMA),
    "gemma2": (LAYER, GEMMA),
    "gemma3": (LAYER, GEMMA),
    "olmo2": (LAYER, (VALUES, UP)),  # its norms come after the layers
    "mixtral": (LAYER, (
        Row("input_layernorm", QKV), VALUES,
        Row("post_attention_layernorm", f"{ROUTED}gate {ROUTED}experts.w1 {ROUTED}experts.w3"))),
    "qwen3_moe": (LAYER, (
        Row("input_layernorm", QKV), VALUES,
        Row("post_attention_layernorm", "mlp.gate mlp.experts.gate_proj mlp.experts.up_proj"))),
    "gpt_oss": (LAYER, (
        Row("input_layernorm", QKV), VALUES,
        Row("post_attention_layernorm", "mlp.router mlp.experts.gate_up_proj"))),
    "phi3": (LAYER, (
        Row("input_layernorm", "self_attn.qkv_proj"), Row("post_attention_layernorm", "mlp.gate_up_proj"),
        Row("self_attn.qkv_proj", "self_attn.o_proj", _after_queries_and_keys),
        Row("mlp.gate_up_proj", "mlp.down_proj", _second_half))),
    "gpt2": ("transformer.h.{i}.", (
        Row("ln_1", "attn.c_attn"), Row("ln_2", "mlp.c_fc"),
        Row("attn.c_attn", "attn.c_proj", _after_queries_and_keys))),
    "gpt_neox": ("gpt_neox.layers.{i}.", (
        Row("input_layernorm", "attention.query_key_value"), Row("post_attention_layernorm", "mlp.dense_h_to_4h"),
        Row("attention.query_key_value", "attention.dense", _third_of_every_head))),
    "opt": ("model.decoder.layers.{i}.", (
        Row("self_attn_layer_norm", QKV, present=_norm_first), Row("final_layer_norm", "fc1", present=_norm_first),
        Row("self_attn.v_proj", "self_attn.out_proj", _heads), Row("fc1", "fc2", present=_relu))),
}


def sites(checkpoint: Checkpoint) -> list[Site]:
    """Every site of a model, layer by layer; a row whose tensors are not all in a layer has none there.

    Raises:
        FewbitsError: no table for the family, no tensors for its rows, or shapes that don't fit together.
    """
    family, outline = arch.lookup(checkpoint.config), arch.outline(checkpoint.config)
    name = family.name if family else outline.name if outline else ""
    if name not in TABLES:
        raise FewbitsError(f"{checkpoint.path}: there is no table of where scales can move through "
                           f"{checkpoint.architecture}", "leave --transform out; there are tables of "
                           + ", ".join(TABLES))
    config = arch.complete(family, checkpoint.config) if family else checkpoint.config
    prefix, table = TABLES[name]
    rows = [row for row in table if row.present(config)]
    found = [_site(row, prefix.format(i=i), config, checkpoint)
             for i in range(config["num_hidden_layers"]) for row in rows]
    kept = [site for site in found if site]
    if not kept:
        raise FewbitsError(f"{checkpoint.path}: has none of the tensors that scales can move through",
                           "leave --transform out")
    return kept


def _site(row: Row, prefix: str, config: Config, checkpoint: Checkpoint) -> Site | None:
    entries = checkpoint.entries
    names = [_weight(prefix + name, entries) for name in (row.producer, *row.consumers.split())]
    if None in names:
        return None
    producer, *consumers = (name for name in names if name)
    outputs = entries[producer].shape[0]
    rows = row.rows(config) if row.rows else torch.arange(outputs)
    for name in consumers:
        if entries[name].shape[-1] != len(rows) or int(rows.max()) >= outputs:
            raise FewbitsError(f"{checkpoint.path}: {name} has {entries[name].shape[-1]} inputs, which do not fit the "
                               f"{outputs} outputs of {producer}")
    bias = producer.removesuffix("weight") + "bias"
    return Site(producer, bias if bias in entries else None, tuple(consumers), rows, row.add_one)


def _weight(name: str, entries: dict[str, Entry]) -> str | None:
    return next((n for n in (name + ".weight", name) if n in entries), None)
