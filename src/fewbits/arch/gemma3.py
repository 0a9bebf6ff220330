"""Gemma 3, its text model: norms that multiply by 1 + w, five sliding layers to a full one, two rotary bases."""

from __future__ import annotations

from fewbits.arch import rope
from fewbits.arch.base import LAYER, MLP, SIZES, Architecture, Config, Field, Values, Weight, head_dim, plus_one, tied

PATTERN = 6  # every sixth layer sees all positions; GGUF's gemma3 implies it
LARGEST = 62  # layers of the 27B model, the only one whose attention is scaled otherwise


def _scale(values: Config) -> int:
    """`query_pre_attn_scalar` as GGUF's gemma3 implies it."""
    if values["num_hidden_layers"] == LARGEST:
        return int(values["hidden_size"] // values["num_attention_heads"])
    return head_dim(values)


def _layers(count: int) -> list[str]:
    return ["full_attention" if (i + 1) % PATTERN == 0 else "sliding_attention" for i in range(count)]


def _refuse(config: Config) -> str | None:
    act = config.get("hidden_activation", "gelu_pytorch_tanh")
    if act != "gelu_pytorch_tanh":
        return f"hidden_activation is {act!r}, gemma3 in GGUF means 'gelu_pytorch_tanh'"
    if config.get("attention_bias"):
        return "attention_bias is set: gemma3 in GGUF has no biases"
    if config.get("use_bidirectional_attention"):
        return "use_bidirectional_attention is set: gemma3 in GGUF is causal"
    if config.get("attn_logit_softcapping"):
        return "attn_logit_softcapping is set: gemma3 in GGUF has none"
    layers, pattern = config.get("layer_types"), config.get("sliding_window_pattern", PATTERN)
    if pattern != PATTERN or layers not in (None, _layers(config["num_hidden_layers"])):
        return f"its layers do not follow {PATTERN - 1} sliding to 1 full, as gemma3 in GGUF does"
    if config.get("query_pre_attn_scalar", 256) != _scale(config):
        return (f"query_pre_attn_scalar is {config.get('query_pre_attn_scalar', 256)}: gemma3 in GGUF means "
                f"{_scale(config)}")
    return (rope.refuse(config, ("default", "linear"), "full_attention")
            or rope.refuse(config, ("default",), "sliding_attention"))


def _metadata(config: Config) -> Values:
    local = rope.parameters(config, "sliding_attention")["rope_theta"]
    return (rope.metadata(config, "full_attention") | {"attention.value_length": ("UINT32", head_dim(config))}
            | ({} if local == 10000.0 else {"rope.freq_base_swa": ("FLOAT32", local)}))


def _config(values: Values) -> Config:
    shape = {"num_hidden_layers": values["block_count"], "hidden_size": values["embedding_length"],
             "num_attention_heads": values["attention.head_count"],
             "head_dim": values.get("attention.key_length")}
    local = {"rope_type": "default", "rope_theta": float(values.get("rope.freq_base_swa", 10000.0))}
    full = rope.config(values)["rope_parameters"]
    return {"layer_types": _layers(values["block_count"]), "query_pre_attn_scalar": _scale(shape),
            "rope_parameters": {"full_attention": full, "sliding_attention": local}}


GEMMA3 = Architecture(
    name="gemma3",
    gguf="gemma3",
    architectures=("Gemma3ForCausalLM",),
    model_types=("gemma3_text",),
    weights=(
        Weight("model.norm.weight", "output_norm.weight", "norm", plus_one),
        Weight("model.embed_tokens.weight", "token_embd.weight", "token_embd"),
        Weight("lm_head.weight", "output.weight", "output", present=lambda c: not tied(c)),
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
