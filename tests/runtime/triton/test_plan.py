"""The decoder of a GPU, in Triton's interpreter: against Transformers, and against itself in parts, beside others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fewbits import containers
from fewbits.runtime import decoder
from fewbits.runtime.sequences import Decoder
from fewbits.runtime.triton.engine import Gpu
from tests.arch.models import directory, tiny
from tests.runtime.test_decoder import MODELS, TOKENS, nmse, reference

HOST = torch.device("cpu")


def compiled(path: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return decoder.compile_for(containers.open(path), Gpu(HOST, dtype))


@pytest.mark.parametrize("name", ["llama"])
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = tiny(MODELS[name])
    made = compiled(directory(model, tmp_path / "m"))
    want = reference(model)
    assert nmse(made.logits(TOKENS), want) <= 1e-9
    sequence = made.sequence(len(TOKENS))
    found = [sequence.append(TOKENS[:70], False), sequence.append(TOKENS[70:73], False)]
    found += [sequence.append([token]) for token in TOKENS[73:76]]
    assert nmse(np.concatenate(found), want[:76]) <= 1e-9
