"""OLMo 2: norms after attention and feed-forward instead of before, and on whole queries and keys."""

from __future__ import annotations

from fewbits.arch import rope
from fewbits.arch.base import HEAD_SIZES, LAYER, MLP, Architecture, Config, Values, Weight, head_dim, tied, untied


def _refuse(config: Config) -> str | None:
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act is {config['hidden_act']!r}, olmo2 in GGUF means 'silu'"
    if config.get("attention_bias"):
        return "attention_bias is set: olmo2 in GGUF has none"
    if tied(config):
        return "the output head is tied to the embedding: olmo2 in GGUF has a head of its own"
    if head_dim(config) * config["num_attention_heads"] != config["hidden_size"]:
        return f"head_dim is {head_dim(config)}: olmo2 in GGUF means hidden_size / num_attention_heads"
    return rope.refuse(config, ("default", "linear", "yarn"))


def _config(values: Values) -> Config:
    if values.get("attention.sliding_window"):
        raise ValueError("attention.sliding_window is set: this is OLMo 3, which there is no table for")
    return rope.config(values)


OLMO2 = Architecture(
    name="olmo2",
    gguf="olmo2",
    architectures=("Olmo2ForCausalLM",),
    model_types=("olmo2",),
    weights=(
        Weight("model.embed_tokens.weight", "token_embd.weight", "token_embd"),
        MLP[2], MLP[0], MLP[1],
        Weight(LAYER + "post_attention_layernorm.weight", "blk.{i}.post_attention_norm.weight", "norm"),
        Weight(LAYER + "post_feedforward_layernorm.weight", "blk.{i}.post_ffw_norm.weight", "norm"),
        Weight(LAYER + "self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight", "norm", dims=("keys",)),
        Weight(LAYER + "self_attn.k_proj.weight", "blk.{i}.attn_k.weight", "attn_k"),
        Weight(LAYER + "self_attn.o_proj.weight", "blk.{i}.attn_output.weight", "attn_output"),
        Weight(LAYER + "self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight", "norm", dims=("queries",)),
        Weight(LAYER + "self_attn.q_proj.weight", "blk.{i}.attn_q.weight", "attn_q"),
        Weight(LAYER + "self_attn.v_proj.weight", "blk.{i}.attn_v.weight", "attn_v"),
        Weight("model.norm.weight", "output_norm.weight", "norm"),
        Weight("lm_head.weight", "output.weight", "output", present=untied),
    ),
    fields=HEAD_SIZES,
    constants={"hidden_act": "silu", "attention_bias": False},
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    refuse=_refuse,
    extra_metadata=rope.metadata,
    extra_config=_config,
)
