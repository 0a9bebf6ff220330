"""Models with experts in llama.cpp: it computes on quantized files what we decode, and picks the types that we pick."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
import torch
import transformers

import fewbits
from fewbits import arch, containers
from fewbits.quantizing import quantize
from fewbits.recipe import ModelFacts, get
from tests.arch.models import EXPERTS, ROPE, directories
from tests.peers.llama import logits

pytestmark = pytest.mark.peer
WIDE = {"vocab_size": 320, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rope_parameters": ROPE}
MODELS = {
    "mixtral": transformers.MixtralConfig(**WIDE, num_local_experts=8, num_experts_per_tok=2),
    "qwen3_moe": transformers.Qwen3MoeConfig(**WIDE, head_dim=64, moe_intermediate_size=256, num_experts=6,
                                             num_experts_per_tok=3, norm_topk_prob=True),
    "gpt_oss": transformers.GptOssConfig(**WIDE, **(EXPERTS | {"head_dim": 64})),
}
QUANTIZE = """
import ctypes, json, sys
import gguf, llama_cpp
quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(quiet, None)
source, target, *types = sys.argv[1:]
out = []
for ftype in types:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(ftype), 1
    assert llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)) == 0
    out.append({t.name: t.tensor_type.name for t in gguf.GGUFReader(target).tensors})
json.dump(out, sys.stdout)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    return directories(MODELS, tmp_path_factory, tiny)


@pytest.mark.parametrize("recipe, bound", [("F16", 1e-5), ("BF16", 1e-3), ("Q8_0", 2e-3), ("Q4_K_M", 2e-3),
                                           ("MXFP4", 2e-3)])
@pytest.mark.parametrize("name", MODELS)
def test_llama_computes_on_what_we_quantized(name, recipe, bound, folder, peer, tmp_path):
    python = peer("llama")
    path = tmp_path / "m.gguf"
    quantize(folder(name), path, recipe, container="gguf")
    tokens = torch.randint(3, 320, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    theirs = logits(python, path, tokens)
    with torch.no_grad():
        ours = fewbits.load(path, kernel="decoded")(torch.tensor([tokens])).logits[0].double().numpy()
    error = ((ours - theirs) ** 2).sum(-1) / (ours ** 2).sum(-1)  # of each token: one routed otherwise is far off
    assert np.median(error) <= bound


@pytest.mark.parametrize("name", MODELS)
def test_mixes_are_those_of_llama(name, folder, peer, tmp_path):
    python = peer("llama")
    quantize(folder(name), tmp_path / "f16.gguf", "F16", container="gguf")
    mixes = ["Q2_K", "Q3_K_M", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"]
    types = [str(get(mix).file_type) for mix in mixes]
    done = subprocess.run([python, "-c", QUANTIZE, str(tmp_path / "f16.gguf"), str(tmp_path / "q.gguf"), *types],
                          check=True, capture_output=True, text=True)
    source = containers.open(folder(name))
    facts = ModelFacts.of(source)
    table = arch.tensors(arch.lookup(source.config), source.config)
    for mix, theirs in zip(mixes, json.loads(done.stdout), strict=True):
        chosen = {c.name: c.codec.name for c in get(mix).resolve(facts)}
        ours = {t.gguf: chosen[t.hf] for t in table}
        wrong = {n: (ours[n], k) for n, k in theirs.items() if ours[n] != k}
        assert not wrong, (mix, wrong)
