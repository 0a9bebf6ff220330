"""Gemma 2: norms on both sides of attention and feed-forward, every other layer sliding, scores and logits capped."""

from __future__ import annotations

from fewbits.arch import gemma, rope
from fewbits.arch.base import (
    LAYER,
    MLP,
    SIZES,
    Architecture,
    Config,
    Field,
    Values,
    Weight,
    head_dim,
    plus_one,
    tied,
    untied,
)

PATTERN = 2  # every second layer sees all positions
LARGEST = 46  # layers of the 27B model, whose attention is scaled otherwise


def _refuse(config: Config) -> str | None:
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not config.get(key):
            return f"{key} is {config.get(key)}: gemma2 in GGUF always caps"
    if not tied(config):
        return "the output head is not tied to the embedding: gemma2 in GGUF has none of its own"
    return gemma.refuse(config, "gemma2", PATTERN, LARGEST) or rope.refuse(config, ("default", "linear"))


def _metadata(config: Config) -> Values:
    return rope.metadata(config) | {"attention.value_length": ("UINT32", head_dim(config))}


def _config(values: Values) -> Config:
    return rope.config(values) | gemma.config(values, PATTERN, LARGEST)


GEMMA2 = Architecture(
    name="gemma2",
    gguf="gemma2",
    architectures=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    weights=(
        Weight("model.embed_tokens.weight", "token_embd.weight", "token_embd"),
        Weight(LAYER + "input_layernorm.weight", "blk.{i}.attn_norm.weight", "norm", plus_one),
        MLP[2], MLP[0], MLP[1],
        Weight(LAYER + "post_attention_layernorm.weight", "blk.{i}.post_attention_norm.weight", "norm", plus_one),
        Weight(LAYER + "post_feedforward_layernorm.weight", "blk.{i}.post_ffw_norm.weight", "norm", plus_one),
        Weight(LAYER + "pre_feedforward_layernorm.weight", "blk.{i}.ffn_norm.weight", "norm", plus_one),
        Weight(LAYER + "self_attn.k_proj.weight", "blk.{i}.attn_k.weight", "attn_k"),
        Weight(LAYER + "self_attn.o_proj.weight", "blk.{i}.attn_output.weight", "attn_output"),
        Weight(LAYER + "self_attn.q_proj.weight", "blk.{i}.attn_q.weight", "attn_q"),
        Weight(LAYER + "self_attn.v_proj.weight", "blk.{i}.attn_v.weight", "attn_v"),
        Weight("model.norm.weight", "output_norm.weight", "norm", plus_one),
        Weight("lm_head.weight", "output.weight", "output", present=untied),
    ),
    fields=SIZES + (
        Field("attention.sliding_window", "sliding_window", "UINT32", lambda c: 4096),
        Field("attn_logit_softcapping", "attn_logit_softcapping", "FLOAT32", lambda c: 50.0, required=False),
        Field("final_logit_softcapping", "final_logit_softcapping", "FLOAT32", lambda c: 30.0, required=False),
    ),
    constants={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "dtype": "bfloat16"},
    defaults={"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
              "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
              "rms_norm_eps": 1e-6, "sliding_window": 4096, "tie_word_embeddings": True},
    refuse=_refuse,
    extra_metadata=_metadata,
    extra_config=_config,
)
