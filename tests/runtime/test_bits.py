"""Logits of tokens together have the bits of logits one by one: what lets guesses be checked in batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fewbits import codecs, containers
from fewbits.checkpoint import Checkpoint
from fewbits.runtime import decoder
from fewbits.solvers import solve
from tests.arch.models import directory, tiny

TOKENS = np.random.default_rng(0).integers(0, 300, 40).tolist()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Rows of more columns than are unpacked at once."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=300, hidden_size=256, intermediate_size=2304, num_hidden_layers=1,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    path: Path = directory(tiny(config), tmp_path_factory.mktemp("wide") / "m")
    return containers.open(path)


@pytest.mark.parametrize("codec", ["f32", "f16", "bf16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q2_K", "int4-g128",
                                   "int4-g64-asym", "nf4"])
def test_together_and_one_by_one(codec: str, wide: Checkpoint, instructions: str) -> None:
    entries = dict(wide.entries)
    for name, entry in entries.items():
        if len(entry.shape) == 2:
            q = solve(entry.load().dequantize(torch.float32), codecs.get(codec))
            entries[name] = entry.as_(codec=q.codec, load=lambda q=q: q)
    model = decoder.compile(Checkpoint(wide.path, wide.container, wide.config, entries, wide.files))
    single = model.sequence(64)
    alone = np.concatenate([single.append([token]) for token in TOKENS])
    for size in (2, 3, 5, 17, 40):
        together = model.sequence(64)
        rows = [together.append(TOKENS[at:at + size], last_only=False) for at in range(0, len(TOKENS), size)]
        assert np.array_equal(np.concatenate(rows), alone), size
