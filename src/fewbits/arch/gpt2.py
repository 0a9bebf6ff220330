"""GPT-2: learned positions, LayerNorm, biases everywhere, fused queries | keys | values, weights held as [in, out]."""

from __future__ import annotations

from fewbits.arch.base import PLAIN_SIZES, Architecture, Config, Field, Weight, inner, no_values, untied

BLOCK = "transformer.h.{i}."
GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # names of one function, the one with a tanh


def _pair(hf: str, gguf: str, role: str, transposed: bool = False) -> tuple[Weight, Weight]:
    return (Weight(f"{hf}.weight", f"{gguf}.weight", role, transposed=transposed),
            Weight(f"{hf}.bias", f"{gguf}.bias", "bias"))


def _refuse(config: Config) -> str | None:
    act = config.get("activation_function", "gelu_new")
    if act not in GELU:
        return f"activation_function is {act!r}, gpt2 in GGUF means 'gelu_new'"
    if config.get("scale_attn_weights") is False:
        return "scale_attn_weights is false: gpt2 in GGUF scales them"
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if config.get(key):
            return f"{key} is set: gpt2 in GGUF does not do that"
    return None


GPT2 = Architecture(
    name="gpt2",
    gguf="gpt2",
    architectures=("GPT2LMHeadModel",),
    model_types=("gpt2",),
    weights=(
        Weight("transformer.wte.weight", "token_embd.weight", "token_embd"),
        Weight("transformer.wpe.weight", "position_embd.weight", "position_embd"),
        *_pair(BLOCK + "ln_1", "blk.{i}.attn_norm", "norm"),
        *_pair(BLOCK + "attn.c_attn", "blk.{i}.attn_qkv", "attn_qkv", transposed=True),
        *_pair(BLOCK + "attn.c_proj", "blk.{i}.attn_output", "attn_output", transposed=True),
        *_pair(BLOCK + "ln_2", "blk.{i}.ffn_norm", "norm"),
        *_pair(BLOCK + "mlp.c_fc", "blk.{i}.ffn_up", "ffn_up", transposed=True),
        *_pair(BLOCK + "mlp.c_proj", "blk.{i}.ffn_down", "ffn_down", transposed=True),
        *_pair("transformer.ln_f", "output_norm", "norm"),
        Weight("lm_head.weight", "output.weight", "output", present=untied),
    ),
    fields=(*(f for f in PLAIN_SIZES if f.hf != "intermediate_size"),
            Field("feed_forward_length", "intermediate_size", "UINT32", inner),
            Field("attention.layer_norm_epsilon", "layer_norm_epsilon", "FLOAT32", lambda c: 1e-5)),
    constants={"activation_function": "gelu_new"},
    defaults={"vocab_size": 50257, "max_position_embeddings": 1024, "hidden_size": 768, "num_hidden_layers": 12,
              "num_attention_heads": 12, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    refuse=_refuse,
    extra_metadata=no_values,
    extra_config=no_values,
    spelling={"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
              "max_position_embeddings": "n_positions", "intermediate_size": "n_inner"},
    base="transformer.",
    skipped=(".attn.bias", ".attn.masked_bias"),
)
