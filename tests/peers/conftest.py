"""What peer tests share: a small Llama in float16, written without us."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

VOCABULARY = 96


@pytest.fixture(scope="session")
def little_llama() -> Callable[[Path, int], Path]:
    """`little_llama(folder, mlp_width)` makes a Transformers directory of one block."""

    def make(path: Path, width: int) -> Path:
        hidden, heads, kv = 64, 4, 2
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float16",
                  "vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": 1,
                  "num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": 64,
                  "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
        layer, kv_width = "model.layers.0.", hidden // heads * kv
        shapes = {"model.embed_tokens": (VOCABULARY, hidden), "lm_head": (VOCABULARY, hidden), "model.norm": (hidden,),
                  layer + "input_layernorm": (hidden,), layer + "post_attention_layernorm": (hidden,),
                  layer + "self_attn.q_proj": (hidden, hidden), layer + "self_attn.k_proj": (kv_width, hidden),
                  layer + "self_attn.v_proj": (kv_width, hidden), layer + "self_attn.o_proj": (hidden, hidden),
                  layer + "mlp.gate_proj": (width, hidden), layer + "mlp.up_proj": (width, hidden),
                  layer + "mlp.down_proj": (hidden, width)}
        draw = torch.Generator().manual_seed(0)
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        weights = {f"{k}.weight": (torch.randn(s, generator=draw) / 8).half() for k, s in shapes.items()}
        safetensors.torch.save_file(weights, path / "model.safetensors", {"format": "pt"})
        return path

    return make
