"""Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values, and rotary pairs left half-split."""

from __future__ import annotations

from fewbits.arch import rope
from fewbits.arch.base import HEAD_SIZES, LAYER, MLP, Architecture, Config, Values, Weight, head_dim, untied


def _refuse(config: Config) -> str | None:
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act is {config['hidden_act']!r}, qwen2 in GGUF means 'silu'"
    if config.get("use_sliding_window"):
        return "use_sliding_window is set: qwen2 in GGUF attends to all positions"
    if head_dim(config) * config["num_attention_heads"] != config["hidden_size"]:
        return f"head_dim is {head_dim(config)}: qwen2 in GGUF means hidden_size / num_attention_heads"
    return rope.refuse(config, ("default", "linear", "yarn"))


def _config(values: Values) -> Config:
    return rope.config(values) | {"use_sliding_window": False}


QWEN2 = Architecture(
    name="qwen2",
    gguf="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    weights=(
        Weight("model.embed_tokens.weight", "token_embd.weight", "token_embd"),
        Weight(LAYER + "input_layernorm.weight", "blk.{i}.attn_norm.weight", "norm"),
        MLP[2], MLP[0], MLP[1],
        Weight(LAYER + "post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", "norm"),
        Weight(LAYER + "self_attn.k_proj.bias", "blk.{i}.attn_k.bias", "bias"),
        Weight(LAYER + "self_attn.k_proj.weight", "blk.{i}.attn_k.weight", "attn_k"),
        Weight(LAYER + "self_attn.o_proj.weight", "blk.{i}.attn_output.weight", "attn_output"),
        Weight(LAYER + "self_attn.q_proj.bias", "blk.{i}.attn_q.bias", "bias"),
        Weight(LAYER + "self_attn.q_proj.weight", "blk.{i}.attn_q.weight", "attn_q"),
        Weight(LAYER + "self_attn.v_proj.bias", "blk.{i}.attn_v.bias", "bias"),
        Weight(LAYER + "self_attn.v_proj.weight", "blk.{i}.attn_v.weight", "attn_v"),
        Weight("model.norm.weight", "output_norm.weight", "norm"),
        Weight("lm_head.weight", "output.weight", "output", present=untied),
    ),
    fields=HEAD_SIZES,
    constants={"hidden_act": "silu"},
    defaults={"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    refuse=_refuse,
    extra_metadata=rope.metadata,
    extra_config=_config,
)
