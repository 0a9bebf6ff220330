"""Mixtral: a Llama with 8 experts in the place of the feed-forward part, of which a router takes 2 for each token.

GGUF calls it "llama" too, with `expert_count`. Files made before 2024-04 have a tensor an expert; they are read.
"""

from __future__ import annotations

from dataclasses import replace

from fewbits.arch.base import EXPERT_COUNTS, HEAD_SIZES, LAYER, Weight, expert_weights
from fewbits.arch.llama import LLAMA

BLOCK = LAYER + "block_sparse_moe."

MIXTRAL = replace(
    LLAMA,
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    model_types=("mixtral",),
    experts=True,
    weights=(
        *(w for w in LLAMA.weights if ".mlp." not in w.hf and w.role != "bias"),
        Weight(BLOCK + "gate.weight", "blk.{i}.ffn_gate_inp.weight", "ffn_gate_inp"),
        *expert_weights(BLOCK + "experts.{part}.weight", gate="w1", down="w2", up="w3"),
    ),
    fields=HEAD_SIZES + EXPERT_COUNTS,
    constants={"hidden_act": "silu"},
    defaults={"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 1e6,
              "num_key_value_heads": 8, "num_experts_per_tok": 2, "num_local_experts": 8},
)
