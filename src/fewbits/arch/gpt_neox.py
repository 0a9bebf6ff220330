"""GPT-NeoX and Pythia: attention and feed-forward side by side, parts of heads rotated, qkv fused head by head."""

from __future__ import annotations

from collections.abc import Callable

from fewbits.arch import rope
from fewbits.arch.base import PLAIN_SIZES, Architecture, Config, Field, Ops, Values, Weight, head_dim, tied, untied
from fewbits.arch.rows import Regroup

BLOCK = "gpt_neox.layers.{i}."


def _apart(config: Config) -> Ops:
    return (Regroup(config["num_attention_heads"], 3),)


def _same(config: Config) -> Ops:
    return ()


def _always(config: Config) -> bool:
    return True


def _attention_bias(config: Config) -> bool:
    return bool(config.get("attention_bias", True))


def _pair(hf: str, gguf: str, role: str, ops: Callable[[Config], Ops] = _same,
          bias: Callable[[Config], bool] = _always) -> tuple[Weight, Weight]:
    return Weight(f"{hf}.weight", f"{gguf}.weight", role, ops), Weight(f"{hf}.bias", f"{gguf}.bias", "bias", ops, bias)


def _refuse(config: Config) -> str | None:
    if not config.get("hidden_act", "gelu").startswith("gelu"):
        return f"hidden_act is {config['hidden_act']!r}, gptneox in GGUF means 'gelu'"
    if config.get("attention_bias") is False:
        return "attention_bias is false: gptneox in GGUF has biases"
    if tied(config):
        return "the output head is tied to the embedding: gptneox in GGUF has a head of its own"
    return rope.refuse(config, ("default", "linear", "yarn"), partial=True)


def _metadata(config: Config) -> Values:
    return rope.metadata(config) | {"rope.dimension_count": ("UINT32", rope.rotary(config, head_dim(config)))}


GPT_NEOX = Architecture(
    name="gpt_neox",
    gguf="gptneox",
    architectures=("GPTNeoXForCausalLM",),
    model_types=("gpt_neox",),
    weights=(
        Weight("gpt_neox.embed_in.weight", "token_embd.weight", "token_embd"),
        *_pair(BLOCK + "attention.dense", "blk.{i}.attn_output", "attn_output", bias=_attention_bias),
        *_pair(BLOCK + "attention.query_key_value", "blk.{i}.attn_qkv", "attn_qkv", _apart, _attention_bias),
        *_pair(BLOCK + "input_layernorm", "blk.{i}.attn_norm", "norm"),
        *_pair(BLOCK + "mlp.dense_4h_to_h", "blk.{i}.ffn_down", "ffn_down"),
        *_pair(BLOCK + "mlp.dense_h_to_4h", "blk.{i}.ffn_up", "ffn_up"),
        *_pair(BLOCK + "post_attention_layernorm", "blk.{i}.ffn_norm", "norm"),
        *_pair("gpt_neox.final_layer_norm", "output_norm", "norm"),
        Weight("embed_out.weight", "output.weight", "output", present=untied),
    ),
    fields=(*PLAIN_SIZES,
            Field("attention.layer_norm_epsilon", "layer_norm_eps", "FLOAT32", lambda c: 1e-5),
            Field("use_parallel_residual", "use_parallel_residual", "BOOL", lambda c: True)),
    constants={"hidden_act": "gelu", "attention_bias": True},
    defaults={"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "tie_word_embeddings": False,
              "use_parallel_residual": True, "partial_rotary_factor": 0.25},
    refuse=_refuse,
    extra_metadata=_metadata,
    extra_config=rope.config,
    spelling={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    base="gpt_neox.",
    skipped=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
)
