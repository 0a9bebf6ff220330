"""ViT, in the names of its files; the patch convolution and the classifier are left alone."""

from __future__ import annotations

from fewbits.arch.outline import Outline, linear

VIT = Outline(
    name="vit",
    model_types=("vit",),
    roles={
        **linear("encoder.layer.{i}.", attention__attention__query="attn_q", attention__attention__key="attn_k",
                 attention__attention__value="attn_v", attention__output__dense="attn_output",
                 intermediate__dense="ffn_up", output__dense="ffn_down"),
        "pooler.dense.weight": "linear",
    },
    reason="llama.cpp has no models of images alone",
    prefixes=(("vit.", ""),),
)
