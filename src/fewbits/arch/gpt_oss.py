"""gpt-oss: fused experts with biases and a clamped SwiGLU, attention sinks, a sliding layer before each full one.

Gate and up lie in turns in the rows of one tensor; GGUF has them apart. Float checkpoints hold that tensor and the one
for `down` as `[experts, in, out]`. OpenAI's models set `truncate` to false in their yarn settings; llama.cpp rounds the
bounds of the ramp to whole dimensions all the same.
"""

from __future__ import annotations

from fewbits.arch import rope
from fewbits.arch.base import (
    EXPERT_COUNTS,
    LAYER,
    SIZES,
    Architecture,
    Config,
    Field,
    Ops,
    Values,
    Weight,
    head_dim,
    tied,
    untied,
)
from fewbits.arch.rows import Every

EXPERTS = LAYER + "mlp.experts."
ALPHA, LIMIT = 1.702, 7.0  # of the SwiGLU, fixed in llama.cpp
GATE, UP = 0, 1  # which of each two rows


def _weights(part: int) -> Ops:
    return (Every(part, 2, axis=-2),)


def _biases(part: int) -> Ops:
    return (Every(part, 2, axis=-1),)


def _layers(count: int) -> list[str]:
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]


def _refuse(config: Config) -> str | None:
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act is {config['hidden_act']!r}, gpt-oss in GGUF means 'silu'"
    for key, meant in (("swiglu_alpha", ALPHA), ("swiglu_limit", LIMIT), ("attention_bias", True)):
        if config.get(key, meant) != meant:
            return f"{key} is {config[key]}, gpt-oss in GGUF means {meant}"
    if config.get("layer_types") not in (None, _layers(config["num_hidden_layers"])):
        return "its layers are not a sliding and a full one in turns, as gpt-oss in GGUF are"
    if tied(config):
        return "its head is tied to the embeddings: gpt-oss in GGUF has a head of its own"
    settings = rope.parameters(config)
    if settings["rope_type"] == "yarn" and settings.pop("truncate", True):
        return "yarn without truncate = False, which gpt-oss in GGUF means"
    return rope.refuse({"rope_parameters": settings}, ("default", "yarn"))


def _metadata(config: Config) -> Values:
    return rope.metadata(config) | {"attention.value_length": ("UINT32", head_dim(config)),
                                    "expert_feed_forward_length": ("UINT32", config["intermediate_size"])}


def _config(values: Values) -> Config:
    found = rope.config(values)
    if found["rope_parameters"]["rope_type"] == "yarn":
        found["rope_parameters"]["truncate"] = False
    inner = values["expert_feed_forward_length"]
    return found | {"layer_types": _layers(values["block_count"]), "intermediate_size": inner}


def _attention(part: str, role: str, bias: str) -> tuple[Weight, Weight]:
    hf, gguf = LAYER + f"self_attn.{part}_proj.", f"blk.{{i}}.{role}."
    return (Weight(hf + "bias", gguf + "bias", "bias", dims=(bias,)), Weight(hf + "weight", gguf + "weight", role))


GPT_OSS = Architecture(
    name="gpt_oss",
    gguf="gpt-oss",
    architectures=("GptOssForCausalLM",),
    model_types=("gpt_oss",),
    experts=True,
    weights=(
        Weight("model.embed_tokens.weight", "token_embd.weight", "token_embd"),
        Weight(LAYER + "input_layernorm.weight", "blk.{i}.attn_norm.weight", "norm"),
        Weight(EXPERTS + "down_proj", "blk.{i}.ffn_down_exps.weight", "ffn_down", dims=("experts", "hidden", "inner"),
               transposed=True),
        Weight(EXPERTS + "down_proj_bias", "blk.{i}.ffn_down_exps.bias", "bias", dims=("experts", "hidden")),
        Weight(EXPERTS + "gate_up_proj", "blk.{i}.ffn_gate_exps.weight", "ffn_gate", lambda c: _weights(GATE),
               dims=("experts", "gate_up", "hidden"), transposed=True),
        Weight(EXPERTS + "gate_up_proj_bias", "blk.{i}.ffn_gate_exps.bias", "bias", lambda c: _biases(GATE),
               dims=("experts", "gate_up")),
        Weight(EXPERTS + "gate_up_proj", "blk.{i}.ffn_up_exps.weight", "ffn_up", lambda c: _weights(UP),
               dims=("experts", "gate_up", "hidden"), transposed=True),
        Weight(EXPERTS + "gate_up_proj_bias", "blk.{i}.ffn_up_exps.bias", "bias", lambda c: _biases(UP),
               dims=("experts", "gate_up")),
        Weight(LAYER + "mlp.router.bias", "blk.{i}.ffn_gate_inp.bias", "bias", dims=("experts",)),
        Weight(LAYER + "mlp.router.weight", "blk.{i}.ffn_gate_inp.weight", "ffn_gate_inp"),
        Weight(LAYER + "post_attention_layernorm.weight", "blk.{i}.post_attention_norm.weight", "norm"),
        *_attention("k", "attn_k", "keys"), *_attention("o", "attn_output", "hidden"),
        *_attention("q", "attn_q", "queries"),
        Weight(LAYER + "self_attn.sinks", "blk.{i}.attn_sinks.weight", "attn_sinks"),
        *_attention("v", "attn_v", "keys"),
        Weight("model.norm.weight", "output_norm.weight", "norm"),
        Weight("lm_head.weight", "output.weight", "output", present=untied),
    ),
    fields=SIZES + EXPERT_COUNTS + (Field("attention.sliding_window", "sliding_window", "UINT32", lambda c: 128),),
    constants={"hidden_act": "silu", "attention_bias": True, "swiglu_alpha": ALPHA, "swiglu_limit": LIMIT},
    defaults={"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "head_dim": 64,
              "num_key_value_heads": 8, "num_experts_per_tok": 4, "num_local_experts": 128, "rope_theta": 150000.0,
              "sliding_window": 128},
    refuse=_refuse,
    extra_metadata=_metadata,
    extra_config=_config,
)
