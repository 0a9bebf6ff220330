"""Every family from Transformers to GGUF and back: equal tensors, equal logits, an equal directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import fewbits
from fewbits import arch, containers
from fewbits.containers import gguf_file
from fewbits.containers.directory import TransformersDirectory
from fewbits.containers.gguf import Gguf
from fewbits.containers.gguf_file import Spec, Value
from fewbits.errors import FewbitsError
from fewbits.recipe import ModelFacts
from fewbits.solvers import solve
from tests.arch.models import MODELS, VOCAB, directory
from tests.arch.models import tiny as random_model


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, tmp_path):
    model = random_model(MODELS[name])
    source = containers.open(directory(model, tmp_path / "source"))
    gguf = containers.write(Gguf(), tmp_path / "m.gguf", source)
    assert gguf.entries.keys() == source.entries.keys()

    tokens = torch.randint(0, VOCAB, (1, 40))
    with torch.no_grad():
        wanted = model(tokens).logits
        for path in (tmp_path / "source", tmp_path / "m.gguf"):
            found = fewbits.load(path)(tokens).logits
            other = name == "gpt_neox-sequential"  # its gelu is the one with a tanh; GGUF does not say which
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
    source = containers.open(directory(random_model(MODELS[name]), tmp_path / "source"))
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
    source = containers.open(directory(random_model(MODELS[name]), tmp_path / "source"))
    facts = ModelFacts.from_config(source.config)
    assert {f.name: f.shape for f in facts.tensors} == {e.name: e.shape for e in source.entries.values()}
    assert set(ModelFacts.of(source).tensors) == set(facts.tensors)
    family = arch.lookup(source.config)
    assert len({t.gguf for t in arch.tensors(family, source.config)}) == len(arch.tensors(family, source.config))


def _changed(path: Path, out: Path, **values: Value) -> Path:
    """A GGUF file with other metadata."""
    file = gguf_file.read(path)
    metadata = dict(file.metadata) | {k.replace("__", "."): v for k, v in values.items()}
    specs = list(file.tensors.values())
    gguf_file.write(out, metadata, [Spec(s.name, s.shape, s.type) for s in specs], (file.data(s) for s in specs))
    return out


@pytest.mark.parametrize("name, values, reason", [
    ("llama", {"llama__rope__dimension_count": Value("UINT32", 8)}, "partial_rotary_factor is 0.5"),
    ("olmo2", {"olmo2__attention__sliding_window": Value("UINT32", 8)}, "this is OLMo 3"),
])
def test_files_of_models_that_the_class_does_not_know_are_refused(name, values, reason, tmp_path):
    source = containers.open(directory(random_model(MODELS[name]), tmp_path / "source"))
    containers.write(Gguf(), tmp_path / "m.gguf", source)
    with pytest.raises(FewbitsError, match=reason):
        containers.open(_changed(tmp_path / "m.gguf", tmp_path / "other.gguf", **values))


def test_files_of_the_base_model_and_of_older_days(tmp_path):
    """OpenAI's own GPT-2: no prefix, masks beside the weights; written with the names that all others have."""
    model = random_model(MODELS["gpt2"])
    folder = directory(model, tmp_path / "source")
    weights = load_file(folder / "model.safetensors")
    old = {n.removeprefix("transformer."): w for n, w in weights.items()}
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256).tril() for i in range(2)}
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    source = containers.open(folder)
    assert source.entries.keys() == weights.keys()
    containers.write(Gguf(), tmp_path / "m.gguf", source)
    containers.write(TransformersDirectory(), tmp_path / "back", source)
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == weights.keys() and all(torch.equal(back[n], weights[n]) for n in weights)


@pytest.mark.parametrize("recipe", ["nf4", "int4-g32", "Q4_0"])
def test_gpt_2_is_quantized_as_out_by_in(recipe, tmp_path):
    """Conv1D weights: the codec sees rows of outputs, whatever files and modules do."""
    model = random_model(MODELS["gpt2-inner"])
    folder = directory(model, tmp_path / "source")
    found = fewbits.load(fewbits.quantize(folder, tmp_path / "out", recipe, solver="nearest").path)
    name = "transformer.h.0.mlp.c_fc.weight"
    entry = fewbits.loading.checkpoint_of(found).entries[name]
    meant = solve(model.get_parameter(name).detach().T.contiguous(), entry.codec, "nearest")
    assert entry.shape == (96, 64) and torch.equal(entry.load().dequantize(), meant.dequantize())
    tokens = torch.randint(0, VOCAB, (1, 30))
    with torch.no_grad():
        wanted, got = model(tokens).logits, found(tokens).logits
    assert 0 < (got - wanted).norm() / wanted.norm() < 0.3


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_blocks_are_walked_with_calibration(name, tiny, tmp_path, english):
    """GPTQ's outputs are nearer than those of nearest rounding: statistics reached the right layers and columns."""
    model = random_model(MODELS[name])
    folder = directory(model, tmp_path / "source", tiny)
    tokens = torch.tensor([Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(english.read_text()[:400]).ids])
    far = {}
    for solver, given in (("gptq", {"calibration": english, "samples": 16, "length": 64}), ("nearest", {})):
        result = fewbits.quantize(folder, tmp_path / solver, "int3-g32", solver=solver, **given)
        assert not any("search instead of gptq" in n for n in result.notes), result.notes
        with torch.no_grad():
            wanted = model(tokens[:, :200]).logits
            far[solver] = float((fewbits.load(result.path)(tokens[:, :200]).logits - wanted).norm() / wanted.norm())
    assert far["gptq"] < 0.97 * far["nearest"], far
