"""Qwen3 with experts: 128 narrow ones a layer, of which a router takes 8 for each token."""

from __future__ import annotations

from dataclasses import replace

from fewbits.arch import qwen3
from fewbits.arch.base import EXPERT_COUNTS, LAYER, SIZES, Config, Field, Values, Weight, expert_weights


def _refuse(config: Config) -> str | None:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        return "some of its layers have no experts: in GGUF's qwen3moe all have"
    if not config.get("norm_topk_prob", False):
        return "norm_topk_prob is false: GGUF's qwen3moe means true"
    return qwen3.refuse(config)


def _config(values: Values) -> Config:
    return qwen3.config(values) | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}


QWEN3_MOE = replace(
    qwen3.QWEN3,
    name="qwen3_moe",
    gguf="qwen3moe",
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    experts=True,
    weights=(
        *(w for w in qwen3.QWEN3.weights if ".mlp." not in w.hf),
        Weight(LAYER + "mlp.gate.weight", "blk.{i}.ffn_gate_inp.weight", "ffn_gate_inp"),
        *expert_weights(LAYER + "mlp.experts.{part}.weight", gate="gate_proj", down="down_proj", up="up_proj"),
    ),
    fields=SIZES + EXPERT_COUNTS + (Field("expert_feed_forward_length", "moe_intermediate_size", "UINT32"),),
    defaults={"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
              "num_key_value_heads": 4, "num_experts_per_tok": 8, "num_local_experts": 128,
              "moe_intermediate_size": 768},
    refuse=_refuse,
    extra_config=_config,
    spelling={"num_local_experts": "num_experts"},
)
