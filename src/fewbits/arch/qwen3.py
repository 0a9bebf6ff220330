"""Qwen3: norms on every head's queries and keys, no biases, heads of a width of their own."""

from __future__ import annotations

from fewbits.arch import rope
from fewbits.arch.base import LAYER, MLP, SIZES, Architecture, Config, Values, Weight, head_dim, untied

ATTENTION = (
    Weight(LAYER + "self_attn.k_proj.weight", "blk.{i}.attn_k.weight", "attn_k"),
    Weight(LAYER + "self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight", "norm", dims=("head",)),
    Weight(LAYER + "self_attn.o_proj.weight", "blk.{i}.attn_output.weight", "attn_output"),
    Weight(LAYER + "self_attn.q_proj.weight", "blk.{i}.attn_q.weight", "attn_q"),
    Weight(LAYER + "self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight", "norm", dims=("head",)),
    Weight(LAYER + "self_attn.v_proj.weight", "blk.{i}.attn_v.weight", "attn_v"),
)


def refuse(config: Config) -> str | None:
    name = config.get("model_type", "qwen3")
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act is {config['hidden_act']!r}, {name} in GGUF means 'silu'"
    if config.get("use_sliding_window"):
        return f"use_sliding_window is set: {name} in GGUF attends to all positions"
    if config.get("attention_bias"):
        return f"attention_bias is set: {name} in GGUF has none"
    return rope.refuse(config, ("default", "linear", "yarn"))


def metadata(config: Config) -> Values:
    return rope.metadata(config) | {"attention.value_length": ("UINT32", head_dim(config))}


def config(values: Values) -> Config:
    width = values.get("attention.key_length") or values["embedding_length"] // values["attention.head_count"]
    return rope.config(values) | {"use_sliding_window": False, "head_dim": width}


DEFAULTS: Config = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
                    "head_dim": 128}

QWEN3 = Architecture(
    name="qwen3",
    gguf="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    weights=(
        Weight("model.embed_tokens.weight", "token_embd.weight", "token_embd"),
        Weight(LAYER + "input_layernorm.weight", "blk.{i}.attn_norm.weight", "norm"),
        MLP[2], MLP[0], MLP[1],
        Weight(LAYER + "post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", "norm"),
        *ATTENTION,
        Weight("model.norm.weight", "output_norm.weight", "norm"),
        Weight("lm_head.weight", "output.weight", "output", present=untied),
    ),
    fields=SIZES,
    constants={"hidden_act": "silu", "attention_bias": False},
    defaults=DEFAULTS,
    refuse=refuse,
    extra_metadata=metadata,
    extra_config=config,
)
