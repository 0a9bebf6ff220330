"""Phi-3 and Phi-4: a Llama with fused queries | keys | values and gate | up, and two lists of rotary divisors.

llama.cpp takes the long list once its context is longer than the original one, Transformers once a text is. A window
(`sliding_window`) is written down in the file; llama.cpp reads it and attends to all positions.
"""

from __future__ import annotations

import math

from fewbits.arch import rope
from fewbits.arch.base import HEAD_SIZES, LAYER, Architecture, Config, Field, Values, Weight, head_dim, untied

ORIGINAL = "original_max_position_embeddings"


def _refuse(config: Config) -> str | None:
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act is {config['hidden_act']!r}, phi3 in GGUF means 'silu'"
    if head_dim(config) * config["num_attention_heads"] != config["hidden_size"]:
        return f"head_dim is {head_dim(config)}: phi3 in GGUF means hidden_size / num_attention_heads"
    settings, width = rope.parameters(config), rope.rotary(config, head_dim(config))
    if settings["rope_type"] == "longrope":
        for key in ("long_factor", "short_factor"):
            if len(settings.get(key) or []) != width // 2:
                return f"{key} has {len(settings.get(key) or [])} entries for {width} rotated columns"
    return rope.refuse(config, ("default", "longrope"), partial=True)


def _metadata(config: Config) -> Values:
    settings = rope.parameters(config)
    original = int(settings.get(ORIGINAL) or config.get(ORIGINAL) or config["max_position_embeddings"])
    values: Values = {"rope.freq_base": ("FLOAT32", settings["rope_theta"]),
                      "rope.dimension_count": ("UINT32", rope.rotary(config, head_dim(config))),
                      "rope.scaling.original_context_length": ("UINT32", original)}
    if settings["rope_type"] == "longrope":
        values["rope.scaling.attn_factor"] = ("FLOAT32", _attention_factor(config, settings, original))
    return values


def _attention_factor(config: Config, settings: Config, original: int) -> float:
    """What queries and keys are multiplied by, as Transformers derives it where the configuration is silent."""
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    factor = settings.get("factor") or config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _config(values: Values) -> Config:
    found = rope.config(values) | {"sliding_window": values.get("attention.sliding_window") or None}
    if "rope.scaling.original_context_length" in values:
        found[ORIGINAL] = values["rope.scaling.original_context_length"]
    return found


PHI3 = Architecture(
    name="phi3",
    gguf="phi3",
    architectures=("Phi3ForCausalLM",),
    model_types=("phi3",),
    weights=(
        Weight("model.embed_tokens.weight", "token_embd.weight", "token_embd"),
        Weight(LAYER + "input_layernorm.weight", "blk.{i}.attn_norm.weight", "norm"),
        Weight(LAYER + "mlp.down_proj.weight", "blk.{i}.ffn_down.weight", "ffn_down"),
        Weight(LAYER + "mlp.gate_up_proj.weight", "blk.{i}.ffn_up.weight", "ffn_up", dims=("gate_up", "hidden")),
        Weight(LAYER + "post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", "norm"),
        Weight(LAYER + "self_attn.o_proj.weight", "blk.{i}.attn_output.weight", "attn_output"),
        Weight(LAYER + "self_attn.qkv_proj.weight", "blk.{i}.attn_qkv.weight", "attn_qkv"),
        Weight("model.norm.weight", "output_norm.weight", "norm"),
        Weight("lm_head.weight", "output.weight", "output", present=untied),
    ),
    fields=(*HEAD_SIZES, Field("attention.sliding_window", "sliding_window", "UINT32", lambda c: 0, required=False)),
    constants={"hidden_act": "silu"},
    defaults={"vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
              "tie_word_embeddings": False},
    refuse=_refuse,
    extra_metadata=_metadata,
    extra_config=_config,
)
