"""Every family from Transformers to GGUF and back: equal tensors, equal logits, an equal directory."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

import fewbits
from fewbits import arch, containers
from fewbits.containers.directory import TransformersDirectory
from fewbits.containers.gguf import Gguf
from fewbits.recipe import ModelFacts
from tests.arch.models import MODELS, VOCAB, directory, tiny


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, tmp_path):
    model = tiny(MODELS[name])
    source = containers.open(directory(model, tmp_path / "source"))
    gguf = containers.write(Gguf(), tmp_path / "m.gguf", source)
    assert gguf.entries.keys() == source.entries.keys()

    tokens = torch.randint(0, VOCAB, (1, 40))
    with torch.no_grad():
        wanted = model(tokens).logits
        for path in (tmp_path / "source", tmp_path / "m.gguf"):
            found = fewbits.load(path)(tokens).logits
            other = getattr(MODELS[name], "hidden_act", "") == "gelu_new"  # GGUF does not say which gelu
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-2 if other else 2e-4)

    containers.write(TransformersDirectory(), tmp_path / "back", gguf)
    before, after = load_file(tmp_path / "source/model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    again, _ = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(_[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(model) or name == "mistral"  # GGUF files of it say llama


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_comes_back(name, tmp_path):
    source = containers.open(directory(tiny(MODELS[name]), tmp_path / "source"))
    back = containers.write(Gguf(), tmp_path / "m.gguf", source).config
    kind = type(MODELS[name])
    ours, theirs = kind(**{k: v for k, v in back.items() if k != "architectures"}).to_dict(), MODELS[name].to_dict()
    loose = {"dtype", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id", "architectures", "rope_parameters",
             "transformers_version", "num_key_value_heads", "head_dim", "n_inner"}
    numbers = {k for k, v in theirs.items() if isinstance(v, (int, float, str)) and k not in loose}
    close = {k: pytest.approx(theirs[k], rel=1e-6) if isinstance(theirs[k], float) else theirs[k] for k in numbers}
    assert {k: ours[k] for k in numbers} == close


@pytest.mark.parametrize("name", MODELS)
def test_the_table_knows_names_shapes_and_roles(name, tmp_path):
    source = containers.open(directory(tiny(MODELS[name]), tmp_path / "source"))
    facts = ModelFacts.from_config(source.config)
    assert {f.name: f.shape for f in facts.tensors} == {e.name: e.shape for e in source.entries.values()}
    assert set(ModelFacts.of(source).tensors) == set(facts.tensors)
    family = arch.lookup(source.config)
    assert len({t.gguf for t in arch.tensors(family, source.config)}) == len(arch.tensors(family, source.config))
