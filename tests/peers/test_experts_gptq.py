"""GPTQModel finds every expert of what we write, and computes what we compute."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
import torch
import transformers

import fewbits
from fewbits.quantizing import quantize
from tests.arch.models import ROPE, VOCAB, directory
from tests.arch.models import tiny as small

pytestmark = pytest.mark.peer
CONFIG = transformers.Qwen3MoeConfig(
    vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, head_dim=32,
    num_key_value_heads=2, max_position_embeddings=256, rope_parameters=ROPE, moe_intermediate_size=128, num_experts=4,
    num_experts_per_tok=2, norm_topk_prob=True)
LOGITS = """
import sys, json, numpy, torch
from gptqmodel import GPTQModel, BACKEND
source, tokens, out = sys.argv[1:]
model = GPTQModel.load(source, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
with torch.no_grad():
    numpy.save(out, model(torch.tensor([json.loads(tokens)])).logits[0].float().numpy())
"""


def test_gptqmodel_finds_every_expert(tmp_path, peer, tiny):
    python = peer("gptq")
    quantize(directory(small(CONFIG), tmp_path / "m", tiny), tmp_path / "int4", "int4-g32", calibration="none")
    tokens = torch.randint(3, VOCAB, (32,), generator=torch.Generator().manual_seed(1)).tolist()
    subprocess.run([python, "-c", LOGITS, str(tmp_path / "int4"), json.dumps(tokens), str(tmp_path / "out.npy")],
                   check=True, capture_output=True)
    theirs = np.load(tmp_path / "out.npy").astype(np.float64)
    with torch.no_grad():
        ours = fewbits.load(tmp_path / "int4", kernel="decoded")(torch.tensor([tokens])).logits[0].double().numpy()
    error = ((ours - theirs) ** 2).sum(-1) / (ours ** 2).sum(-1)
    assert np.median(error) <= 1e-5  # 9e-7 measured: float16 activations
