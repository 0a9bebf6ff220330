"""What the decoder takes where a configuration is silent, against Transformers' configuration objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fewbits.arch.base import head_dim, inner, kv_heads
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.floats import F32
from fewbits.errors import FewbitsError
from fewbits.runtime import decoder, families
from fewbits.runtime.families import FAMILIES, FULL, SLIDING

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
STATED: dict[str, dict[str, Any]] = {  # beside nothing at all
    "layers": {"num_hidden_layers": 7, "n_layer": 7},
    "window": {"sliding_window": 77, "use_sliding_window": True, "max_window_layers": 5, "num_hidden_layers": 7},
    "no-window": {"sliding_window": None, "use_sliding_window": True},
    "theta": {"rope_theta": 123.0},
    "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "nulls": {"head_dim": None, "num_key_value_heads": None, "n_inner": None, "rope_scaling": None,
              "layer_types": None, "mlp_only_layers": None},
    "old-gemma": {"sliding_window_pattern": 3, "rope_theta": 1e5, "rope_local_base_freq": 2e4, "num_hidden_layers": 7,
                  "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "capless": {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 100},
    "neox": {"rotary_pct": 0.5, "rotary_emb_base": 777, "use_parallel_residual": False},
}


GEMMA = ("head_dim", "num_key_value_heads")
REFUSED: dict[str, tuple[str, ...]] = {  # by Transformers, or not read
    "gemma2": GEMMA, "gemma3_text": (*GEMMA, "rope_parameters"), "qwen3": ("head_dim",), "phi3": ("rope_scaling",),
    "qwen3_moe": ("num_key_value_heads",), "mistral": ("num_key_value_heads",), "mixtral": ("num_key_value_heads",),
    "gpt_neox": ("rope_theta",),
}
WINDOWS = ("mistral", "phi3", "mixtral", "qwen3_moe")  # on all layers


def checkpoint_of(config: dict[str, Any]) -> Checkpoint:
    """Without tensors, but with as many names."""
    entries = {str(i): Entry(str(i), (1,), F32, lambda: None) for i in range(100)}  # type: ignore[arg-type, return-value]
    return Checkpoint(Path("m"), "test", config, entries)


def complete(config: dict[str, Any]) -> tuple[families.Family, dict[str, Any]]:
    checkpoint = checkpoint_of(config)
    family, table = families.family_of(checkpoint)
    return family, families.settings(checkpoint, family, table)


@pytest.mark.parametrize("stated", ["nothing", *STATED])
@pytest.mark.parametrize("kind", FAMILIES)
def test_silent_configurations(kind: str, stated: str) -> None:
    given = {k: v for k, v in STATED.get(stated, {}).items() if k not in REFUSED.get(kind, ())}
    theirs: Any = transformers.AutoConfig.for_model(kind, **_copy(given))
    family, ours = complete({"model_type": kind} | given)
    assert {k: ours[k] for k in SIZES} == {k: getattr(theirs, k) for k in SIZES}
    layers = theirs.num_hidden_layers
    assert inner(ours) == (getattr(theirs, "intermediate_size", None) or getattr(theirs, "n_inner", None)
                           or 4 * theirs.hidden_size)
    assert kv_heads(ours) == (getattr(theirs, "num_key_value_heads", None) or theirs.num_attention_heads)
    assert head_dim(ours) == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    for key in (family.epsilon, family.activation, *filter(None, family.caps), "query_pre_attn_scalar",
                "use_parallel_residual", "num_experts_per_tok", "num_local_experts", "moe_intermediate_size",
                "scale_attn_weights"):
        assert ours.get(key) == getattr(theirs, key, None), key
    window = getattr(theirs, "sliding_window", None)
    everywhere = [SLIDING if window and kind in WINDOWS else FULL] * layers
    kinds = (getattr(theirs, "layer_types", None) if kind not in WINDOWS else None) or everywhere
    assert family.kinds(ours) == kinds
    if SLIDING in kinds:
        assert ours.get("sliding_window") == window
    for layer_kind, found in decoder._rotations(family, ours, Path()).items():
        frequencies, factor = _frequencies(theirs, layer_kind if family.by_kind else None)
        assert np.allclose(found.frequencies, frequencies, rtol=1e-6, atol=0) and found.factor == factor


def _copy(given: dict[str, Any]) -> dict[str, Any]:
    return {k: dict(v) if isinstance(v, dict) else v for k, v in given.items()}


def _frequencies(config: Any, layer_kind: str | None) -> tuple[np.ndarray, float]:
    parameters = config.rope_parameters[layer_kind] if layer_kind else config.rope_parameters
    made = ROPE_INIT_FUNCTIONS.get(parameters["rope_type"])
    if made is not None:
        found, factor = made(config, "cpu", layer_type=layer_kind)
        return found.numpy(), factor
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    columns = int(width * (parameters.get("partial_rotary_factor") or 1.0))
    return parameters["rope_theta"] ** -(np.arange(0, columns, 2) / columns), 1.0


def test_no_tensors_are_no_model() -> None:
    for kind in FAMILIES:
        with pytest.raises(FewbitsError, match="is missing"):
            decoder.compile(checkpoint_of({"model_type": kind}))
