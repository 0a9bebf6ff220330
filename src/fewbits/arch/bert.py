"""BERT, in the names of its files; heads for tasks are left alone, but for the transform before the words."""

from __future__ import annotations

from fewbits.arch.outline import Outline, linear

BERT = Outline(
    name="bert",
    model_types=("bert",),
    roles={
        **linear("encoder.layer.{i}.", attention__self__query="attn_q", attention__self__key="attn_k",
                 attention__self__value="attn_v", attention__output__dense="attn_output",
                 intermediate__dense="ffn_up", output__dense="ffn_down"),
        **linear("embeddings.", word_embeddings="token_embd", position_embeddings="position_embd",
                 token_type_embeddings="token_types"),
        **linear("", pooler__dense="linear", cls__predictions__transform__dense="linear",
                 cls__predictions__decoder="output"),
    },
    reason="llama.cpp takes BERT with a WordPiece tokenizer, which is not written here",
    prefixes=(("bert.", ""),),
)
