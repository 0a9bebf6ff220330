"""A small random model of every family that goes to GGUF: the table that tests of architectures run over.

Each row is a Transformers configuration with everything on that the family has. `NAME-variant` is a second one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

VOCAB = 320
SMALL = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
ROPE = {"rope_type": "default", "rope_theta": 5e4}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128,
        "long_factor": [1.0 + i / 4 for i in range(6)], "short_factor": [1.0 + i / 8 for i in range(6)],
        "partial_rotary_factor": 0.75}

EXPERTS = {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24}
# the bounds of the ramp are 3 and 10 dimensions: rounding them to whole ones, as llama.cpp does, changes nothing
YARN = {"rope_type": "yarn", "rope_theta": 2756.6979898533536, "original_max_position_embeddings": 888, "factor": 4.0,
        "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}

MODELS: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, rope_parameters=ROPE),
    "mistral": transformers.MistralConfig(**SMALL, sliding_window=None, head_dim=32),
    "qwen2": transformers.Qwen2Config(**SMALL, rope_parameters=ROPE),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=32, rope_parameters=ROPE),
    "qwen3-tied": transformers.Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "gemma2": transformers.Gemma2Config(**(SMALL | {"num_hidden_layers": 3}), head_dim=32, sliding_window=24,
                                        query_pre_attn_scalar=32, attn_logit_softcapping=5.0,
                                        final_logit_softcapping=20.0),
    "gemma3": transformers.Gemma3TextConfig(**(SMALL | {"num_hidden_layers": 7}), head_dim=32, sliding_window=24,
                                            query_pre_attn_scalar=32, final_logit_softcapping=30.0),
    "phi3": transformers.Phi3Config(**SMALL, pad_token_id=0, rope_parameters=ROPE),
    "phi3-longrope": transformers.Phi3Config(**SMALL, pad_token_id=0, tie_word_embeddings=True,
                                             original_max_position_embeddings=128, rope_parameters=LONG),
    "phi3-shortrope": transformers.Phi3Config(**(SMALL | {"max_position_embeddings": 512}), pad_token_id=0,
                                              original_max_position_embeddings=256,
                                              rope_parameters=LONG | {"original_max_position_embeddings": 256}),
    "gpt2": transformers.GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256),
    "gpt2-inner": transformers.GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256, n_inner=96,
                                          tie_word_embeddings=False),
    "gpt_neox": transformers.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
                                           rope_parameters=ROPE | {"partial_rotary_factor": 0.5}),
    "gpt_neox-sequential": transformers.GPTNeoXConfig(
        **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}, hidden_act="gelu_new",
        use_parallel_residual=False),
    "olmo2": transformers.Olmo2Config(**SMALL, rope_parameters=ROPE),
    "mixtral": transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, rope_parameters=ROPE),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SMALL, head_dim=32, moe_intermediate_size=32, num_experts=8,
                                             num_experts_per_tok=3, norm_topk_prob=True, rope_parameters=ROPE),
    "gpt_oss": transformers.GptOssConfig(**SMALL, **EXPERTS, rope_parameters=ROPE),
    "gpt_oss-yarn": transformers.GptOssConfig(**SMALL, **EXPERTS, rope_parameters=YARN),
}


def tiny(config: transformers.PreTrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model; what has one dimension is a multiple of 2^-10, so that adding one to a norm is exact."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-512, 512, p.shape) / 1024 if p.ndim == 1 else torch.randn_like(p) * 0.15)
    return model.eval()


def directory(model: transformers.PreTrainedModel, path: Path, tokenizer: Path | None = None) -> Path:
    """`path` as Transformers writes the model, with the tokenizer of another directory."""
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if tokenizer is not None:
            shutil.copy(tokenizer / name, path / name)
    return path


def directories(configs: dict[str, transformers.PreTrainedConfig], factory: pytest.TempPathFactory,
                tokenizer: Path) -> Callable[[str], Path]:
    """A function that makes the directory of a model by its name, once."""

    @cache
    def make(name: str) -> Path:
        return directory(tiny(configs[name]), factory.mktemp(name) / "m", tokenizer)

    return make
