"""OPT."""

from __future__ import annotations

from fewbits.arch.outline import Outline, linear

BLOCK = "decoder.layers.{i}."

OPT = Outline(
    name="opt",
    model_types=("opt",),
    roles={
        **linear(BLOCK, self_attn__q_proj="attn_q", self_attn__k_proj="attn_k", self_attn__v_proj="attn_v",
                 self_attn__out_proj="attn_output", fc1="ffn_up", fc2="ffn_down"),
        **linear("decoder.", project_in="linear", project_out="linear", embed_tokens="token_embd",
                 embed_positions="position_embd"),
        "lm_head.weight": "output",
    },
    reason="llama.cpp has no OPT",
    prefixes=(("model.", ""),),
)
