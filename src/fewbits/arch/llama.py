"""Llama, and what is a Llama but for its name: Mistral, SmolLM."""

from __future__ import annotations

from fewbits.arch import rope
from fewbits.arch.base import (
    HEAD_SIZES,
    LAYER,
    MLP,
    Architecture,
    Config,
    Ops,
    Values,
    Weight,
    head_dim,
    kv_heads,
    untied,
)
from fewbits.arch.rows import RopePermute


def _queries(config: Config) -> Ops:
    return (RopePermute(config["num_attention_heads"]),)


def _keys(config: Config) -> Ops:
    return (RopePermute(kv_heads(config)),)


def _attention_bias(config: Config) -> bool:
    return bool(config.get("attention_bias", False))


def _mlp_bias(config: Config) -> bool:
    return bool(config.get("mlp_bias", False))


def _refuse(config: Config) -> str | None:
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act is {config['hidden_act']!r}, llama in GGUF means 'silu'"
    window, context = config.get("sliding_window"), config["max_position_embeddings"]
    if window and window < context:
        return f"sliding_window is {window}: llama in GGUF attends to all of its {context} positions"
    return rope.refuse(config, ("default", "linear", "yarn", "llama3"))


def _metadata(config: Config) -> Values:
    width = head_dim(config)
    values: Values = {"rope.dimension_count": ("UINT32", width), "vocab_size": ("UINT32", config["vocab_size"])}
    if width * config["num_attention_heads"] != config["hidden_size"]:
        values |= {"attention.key_length": ("UINT32", width), "attention.value_length": ("UINT32", width)}
    return values | rope.metadata(config)


def _config(values: Values) -> Config:
    width = values.get("attention.key_length") or values["embedding_length"] // values["attention.head_count"]
    return rope.config(values) | {"head_dim": width}


LLAMA = Architecture(
    name="llama",
    gguf="llama",
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    model_types=("llama", "mistral"),
    weights=(
        Weight("model.embed_tokens.weight", "token_embd.weight", "token_embd"),
        Weight(LAYER + "input_layernorm.weight", "blk.{i}.attn_norm.weight", "norm"),
        MLP[2], MLP[0], MLP[1],
        Weight(LAYER + "mlp.down_proj.bias", "blk.{i}.ffn_down.bias", "bias", present=_mlp_bias),
        Weight(LAYER + "mlp.gate_proj.bias", "blk.{i}.ffn_gate.bias", "bias", present=_mlp_bias),
        Weight(LAYER + "mlp.up_proj.bias", "blk.{i}.ffn_up.bias", "bias", present=_mlp_bias),
        Weight(LAYER + "post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", "norm"),
        Weight(LAYER + "self_attn.k_proj.weight", "blk.{i}.attn_k.weight", "attn_k", _keys),
        Weight(LAYER + "self_attn.k_proj.bias", "blk.{i}.attn_k.bias", "bias", _keys, _attention_bias),
        Weight(LAYER + "self_attn.o_proj.weight", "blk.{i}.attn_output.weight", "attn_output"),
        Weight(LAYER + "self_attn.o_proj.bias", "blk.{i}.attn_output.bias", "bias", present=_attention_bias),
        Weight(LAYER + "self_attn.q_proj.weight", "blk.{i}.attn_q.weight", "attn_q", _queries),
        Weight(LAYER + "self_attn.q_proj.bias", "blk.{i}.attn_q.bias", "bias", _queries, _attention_bias),
        Weight(LAYER + "self_attn.v_proj.weight", "blk.{i}.attn_v.weight", "attn_v"),
        Weight(LAYER + "self_attn.v_proj.bias", "blk.{i}.attn_v.bias", "bias", present=_attention_bias),
        Weight("model.norm.weight", "output_norm.weight", "norm"),
        Weight("lm_head.weight", "output.weight", "output", present=untied),
    ),
    fields=HEAD_SIZES,
    constants={"hidden_act": "silu"},
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    refuse=_refuse,
    extra_metadata=_metadata,
    extra_config=_config,
)
