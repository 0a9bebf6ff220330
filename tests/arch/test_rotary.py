"""Rotary frequencies against those of Transformers, for every type and both spellings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from fewbits.arch import rope, rotary
from tests.arch.models import SMALL

ORIGINAL = {"original_max_position_embeddings": 64}
SETTINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.25},
    {"rope_type": "proportional", "rope_theta": 1e6},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.4, **ORIGINAL},
    {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0, **ORIGINAL},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.9, "partial_rotary_factor": 0.5, **ORIGINAL},
    {"rope_type": "yarn", "factor": None, **ORIGINAL},
]
LONG = {"rope_type": "longrope", "long_factor": [1.0 + i / 4 for i in range(16)],
        "short_factor": [1.0 + i / 8 for i in range(16)], **ORIGINAL}


def settings_of(parameters: dict[str, Any], **more: Any) -> tuple[dict[str, Any], transformers.LlamaConfig]:
    config = transformers.LlamaConfig(**SMALL, head_dim=32, rope_parameters=dict(parameters), **more)
    return {**config.to_dict(), "rope_parameters": dict(parameters), **more}, config


def ulps(got: np.ndarray, want: np.ndarray) -> int:
    """The largest distance in units in the last place; 0 where all bits are equal."""
    assert got.dtype == want.dtype == np.float32
    return int(np.abs(got.view(np.int32).astype(int) - want.view(np.int32)).max())


@pytest.mark.parametrize("parameters", SETTINGS, ids=lambda p: "-".join(map(str, p.values())))
def test_frequencies_are_those_of_transformers(parameters: dict[str, Any]) -> None:
    theirs = {"rope_theta": 1e4} | parameters
    ours, config = settings_of(theirs)
    found = rotary.rotation(rope.parameters(ours), 32, config.max_position_embeddings)
    initial: Any = (ROPE_INIT_FUNCTIONS.get(parameters["rope_type"])
                    or Phi3RotaryEmbedding.compute_default_rope_parameters)
    frequencies, factor = initial(config, "cpu")
    assert ulps(found.frequencies, frequencies.numpy()) <= 2
    assert found.factor == pytest.approx(factor, rel=1e-12)
    assert found.stretched is None


@pytest.mark.parametrize("more", [{}, {"factor": 8.0}, {"attention_factor": 1.25}, {"partial_rotary_factor": 1.0}])
def test_longrope(more: dict[str, Any]) -> None:
    ours, config = settings_of(LONG | {"rope_theta": 1e4} | more)
    found = rotary.rotation(rope.parameters(ours), 32, config.max_position_embeddings)
    for length, frequencies in ((64, found.frequencies), (65, found.stretched)):
        want, factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=length)
        assert frequencies is not None and ulps(frequencies, want.numpy()) <= 1
        assert found.factor == pytest.approx(factor, rel=1e-12)
    assert found.original == 64


def test_what_cannot_be_rotated() -> None:
    for settings, match in (({"rope_type": "spiral"}, "rope type 'spiral' is not known; there are default, linear"),
                            ({"rope_type": "linear"}, "rope type 'linear' needs 'factor'"),
                            ({"rope_type": "linear", "factor": "two"}, "rope type 'linear'"),
                            ({"rope_type": "linear", "factor": 0.0}, "rope type 'linear'"),
                            ({"rope_type": "default", "partial_rotary_factor": 7}, "partial_rotary_factor is 7"),
                            ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "rope type 'yarn'")):
        with pytest.raises(ValueError, match=match):
            rotary.rotation({"rope_theta": 1e4} | settings, 32, 256)
