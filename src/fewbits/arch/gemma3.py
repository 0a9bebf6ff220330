"""Gemma 3, its text model: norms that multiply by 1 + w, five sliding layers to a full one, two rotary bases."""

from __future__ import annotations

from fewbits.arch import gemma, rope
from fewbits.arch.base import LAYER, MLP, SIZES, Architecture, Config, Field, Values, Weight, head_dim, plus_one, untied

PATTERN = 6  # every sixth layer sees all positions; GGUF's gemma3 implies it
LARGEST = 62  # layers of the 27B model, the only one whose attention is scaled otherwise


def _refuse(config: Config) -> str | None:
    if config.get("attn_logit_softcapping"):
        return "attn_logit_softcapping is set: gemma3 in GGUF has none"
    return (gemma.refuse(config, "gemma3", PATTERN, LARGEST)
            or rope.refuse(config, ("default", "linear"), "full_attention")
            or rope.refuse(config, ("default",), "sliding_attention"))


def _metadata(config: Config) -> Values:
    local = rope.parameters(config, "sliding_attention")["rope_theta"]
    return (rope.metadata(config, "full_attention") | {"attention.value_length": ("UINT32", head_dim(config))}
            | ({} if local == 10000.0 else {"rope.freq_base_swa": ("FLOAT32", local)}))


def _config(values: Values) -> Config:
    local = {"rope_type": "default", "rope_theta": float(values.get("rope.freq_base_swa", 10000.0))}
    full = rope.config(values)["rope_parameters"]
    return gemma.config(values, PATTERN, LARGEST) | {
        "rope_parameters": {"full_attention": full, "sliding_attention": local}}


GEMMA3 = Architecture(
    name="gemma3",
    gguf="gemma3",
    architectures=("Gemma3ForCausalLM",),
    model_types=("gemma3_text",),
    weights=(
        Weight("model.norm.weight", "output_norm.weight", "norm", plus_one),
        Weight("model.embed_tokens.weight", "token_embd.weight", "token_embd"),
        Weight("lm_head.weight", "output.weight", "output", present=untied),
        Weight(LAYER + "self_attn.k_proj.weight", "blk.{i}.attn_k.weight", "attn_k"),
        Weight(LAYER + "self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight", "norm", plus_one, dims=("head",)),
        Weight(LAYER + "input_layernorm.weight", "blk.{i}.attn_norm.weight", "norm", plus_one),
        Weight(LAYER + "self_attn.o_proj.weight", "blk.{i}.attn_output.weight", "attn_output"),
        Weight(LAYER + "self_attn.q_proj.weight", "blk.{i}.attn_q.weight", "attn_q"),
        Weight(LAYER + "self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight", "norm", plus_one, dims=("head",)),
        Weight(LAYER + "self_attn.v_proj.weight", "blk.{i}.attn_v.weight", "attn_v"),
        MLP[2], MLP[0],
        Weight(LAYER + "pre_feedforward_layernorm.weight", "blk.{i}.ffn_norm.weight", "norm", plus_one),
        MLP[1],
        Weight(LAYER + "post_attention_layernorm.weight", "blk.{i}.post_attention_norm.weight", "norm", plus_one),
        Weight(LAYER + "post_feedforward_layernorm.weight", "blk.{i}.post_ffw_norm.weight", "norm", plus_one),
    ),
    fields=SIZES + (
        Field("attention.sliding_window", "sliding_window", "UINT32", lambda c: 4096),
        Field("final_logit_softcapping", "final_logit_softcapping", "FLOAT32", required=False),
    ),
    constants={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "dtype": "bfloat16"},
    defaults={"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
              "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
              "rms_norm_eps": 1e-6, "sliding_window": 4096, "tie_word_embeddings": True},
    refuse=_refuse,
    extra_metadata=_metadata,
    extra_config=_config,
)
