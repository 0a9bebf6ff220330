"""Every family that goes to GGUF: llama.cpp computes on our file what Transformers computes on its own model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

import fewbits
from fewbits import containers
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import Shape
from fewbits.codecs.floats import F32, Float
from fewbits.containers.gguf import Gguf
from fewbits.qtensor import QTensor
from fewbits.recipe import ModelFacts, llama
from tests.arch.models import MODELS, VOCAB, directory, tiny
from tests.peers.llama import logits
from tests.peers.test_recipe_llama import agree, llama_types, mixes

pytestmark = pytest.mark.peer
TOKENS = 150  # past the sliding windows and one of the original contexts; llama.cpp makes room for 256


def error(python: str, path: Path, model: transformers.PreTrainedModel) -> float:
    """Normalised mean squared error of llama.cpp's logits on the file against the model's."""
    tokens = torch.randint(3, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    theirs = logits(python, path, tokens)
    with torch.no_grad():
        ours = model(torch.tensor([tokens])).logits[0].double().numpy()
    assert ours.std() > 0.1
    return float(((ours - theirs) ** 2).sum() / (ours ** 2).sum())


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path, peer, request):
    model = tiny(MODELS[name])
    source = containers.open(directory(model, tmp_path / "source", request.getfixturevalue("tiny")))
    containers.write(Gguf(), tmp_path / "m.gguf", source)
    assert error(peer("llama"), tmp_path / "m.gguf", model) <= 1e-6


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "qwen3", "gemma2", "olmo2"])
def test_packed_weights_are_moved_as_floats_are(name, tmp_path, peer, request):
    """Rows are permuted packed, both ways: llama.cpp, which rounds activations besides, is near what we load."""
    folder = directory(tiny(MODELS[name]), tmp_path / "source", request.getfixturevalue("tiny"))
    path = fewbits.quantize(folder, tmp_path / "q.gguf", "Q8_0").path
    assert error(peer("llama"), path, fewbits.load(path)) <= 1e-3


WIDE = {"vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 64}
FAMILIES = {
    "qwen3-tied": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                                     "query_pre_attn_scalar": 64, "tie_word_embeddings": True}),
    "phi3": ("Phi3ForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 256, "n_layer": 12, "n_head": 4, "n_positions": 64}),
    "gpt2-odd": ("GPT2LMHeadModel", {"n_embd": 160, "n_layer": 9, "n_head": 4, "n_positions": 64,
                                     "tie_word_embeddings": False}),
    "gpt_neox": ("GPTNeoXForCausalLM", {"num_key_value_heads": 4}), "olmo2": ("Olmo2ForCausalLM", {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_mixes_of_the_family_are_llama_cpps(name, tmp_path, peer):
    """Which type each tensor gets: llama.cpp quantizes a file of ours that holds zeros."""
    kind, changes = FAMILIES[name]
    config = {"architectures": [kind], "dtype": "float16", **({} if kind.startswith("GPT2") else WIDE), **changes,
              "vocab_size": 96}
    facts = ModelFacts.from_config(config)
    kinds = {f.name: F32 if f.role == "position_embd" else f.codec for f in facts.tensors}  # as converters write it
    entries = {f.name: Entry(f.name, f.shape, kinds[f.name], partial(_zeros, kinds[f.name], f.shape))
               for f in facts.tensors}
    source = tmp_path / "f16.gguf"
    containers.write(Gguf(), source, Checkpoint(tmp_path / "source", "transformers", config, entries))
    jobs = [[str(source), str(tmp_path / "out.gguf"), llama.MIXES[mix].file_type, False, weighted]
            for mix, weighted in mixes()]
    meant = [(name, mix, facts, weighted) for mix, weighted in mixes()]
    assert agree(llama_types(peer("llama"), jobs), meant) > 2500


def _zeros(codec: Float, shape: Shape) -> QTensor:
    return QTensor(codec, shape, {"data": torch.zeros(codec.matrix(shape), dtype=codec.dtype)})
