"""llama.cpp computes on a file of allocated types what we compute on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fewbits
from fewbits import containers
from tests.peers.llama import logits

pytestmark = pytest.mark.peer


def test_an_allocated_file_in_llama(peer, tiny: Path, english: Path, tmp_path: Path) -> None:
    """Its logits beside those of the decoded weights; it rounds activations to bytes."""
    result = fewbits.quantize(tiny, tmp_path / "a.gguf", "8bpw", calibration=english, solver="search", length=64)
    types = {e.codec.name for e in containers.open(result.path).entries.values()}
    assert len(types - {"F32", "F16"}) > 1, "a mixture"
    ids = list(range(20, 80))
    theirs = logits(peer("llama"), result.path, ids)
    with torch.no_grad():
        ours = fewbits.load(result.path, kernel="decoded")(torch.tensor([ids])).logits[0].double().numpy()
    assert np.square(theirs - ours).mean() < 1e-3 * np.square(ours - ours.mean()).mean()
