"""Whisper: an encoder of sound and a decoder of text; the two convolutions at its entrance are left alone."""

from __future__ import annotations

from fewbits.arch.outline import Outline, linear

ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "out_proj": "attn_output"}


def _attention(prefix: str) -> dict[str, str]:
    return linear(prefix, **ATTENTION)


WHISPER = Outline(
    name="whisper",
    model_types=("whisper",),
    roles={
        **_attention("encoder.layers.{i}.self_attn."), **linear("encoder.layers.{i}.", fc1="ffn_up", fc2="ffn_down"),
        **_attention("decoder.layers.{i}.self_attn."), **linear("decoder.layers.{i}.", fc1="ffn_up", fc2="ffn_down"),
        **_attention("decoder.layers.{i}.encoder_attn."),
        **linear("encoder.", embed_positions="position_embd"),
        **linear("decoder.", embed_tokens="token_embd", embed_positions="position_embd"),
        "proj_out.weight": "output",
    },
    reason="llama.cpp has no Whisper (whisper.cpp reads files of its own kind)",
    prefixes=(("model.", ""),),
)
