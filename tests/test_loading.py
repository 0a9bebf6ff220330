"""`load` against Transformers itself, on every container, tied and untied; broken checkpoints are named."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.errors import FewbitsError
from fewbits.generate import Session
from fewbits.loading import checkpoint_of
from fewbits.runtime.linear import QEmbedding, QLinear
from fewbits.text.sampling import Sampling

IDS = torch.arange(3, 60)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def test_unquantized_equals_transformers(tiny: Path) -> None:
    want = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    assert torch.equal(logits(fewbits.load(tiny)), logits(want))


def test_a_copy_computes_the_same(tiny: Path) -> None:
    net = fewbits.load(tiny, recipe="nf4")
    assert torch.equal(logits(copy.deepcopy(net)), logits(net))


@pytest.mark.parametrize("recipe,name", [("Q8_0", "a.gguf"), ("int4-g32", "a"), ("nf4-dq", "a"), ("int8", "a"),
                                         ("kmeans4", "a"), ("fp8-e4m3", "a"), ("fp8-e4m3-b4", "a")])
def test_quantized_equals_transformers_on_decoded_weights(recipe: str, name: str, tiny: Path, tmp_path: Path) -> None:
    out = fewbits.quantize(tiny, tmp_path / name, recipe, calibration="none").path
    net, native = fewbits.load(out, kernel="decoded"), fewbits.load(out)
    want = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    decoded = {e.name: e.load().dequantize() for e in checkpoint_of(net).entries.values()}
    want.load_state_dict(decoded, strict=False)
    want.tie_weights()
    torch.testing.assert_close(logits(net), logits(want), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(fewbits.load(out, kernel="decode")), logits(net), rtol=1e-4, atol=1e-4)
    far = (logits(native) - logits(want)).norm() / logits(want).norm()
    assert far < 0.05, "activations are rounded to bytes, which was measured to cost 0.033 at most"
    # in GGUF the head too, but not the two matrices of 172 columns
    assert sum(isinstance(m, QLinear) for m in net.modules()) == (13 if name == "a.gguf" else 14)
    assert isinstance(net.get_input_embeddings(), QEmbedding) == (name == "a.gguf")


def test_conv1d_models_quantize_and_load(tmp_path: Path) -> None:
    """GPT-2 holds its linear layers as `[in, out]`."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=70, n_positions=64, n_embd=64, n_layer=2, n_head=2,
                                     initializer_range=0.2)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "gpt2")
    out = fewbits.quantize(tmp_path / "gpt2", tmp_path / "out", "int8").path
    net = fewbits.load(out)
    assert sum(isinstance(m, QLinear) for m in net.modules()) == 8
    close = (logits(net) - logits(model)).norm() / logits(model).norm()
    assert 0 < close < 0.04


def test_missing_misshapen_and_foreign_tensors_are_named(tiny: Path, tmp_path: Path) -> None:
    weights = load_file(tiny / "model.safetensors")

    def saved(name: str, changed: dict[str, torch.Tensor]) -> Path:
        shutil.copytree(tiny, tmp_path / name)
        save_file(changed, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        return tmp_path / name

    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(FewbitsError, match=f"{name} is missing"):
        fewbits.load(saved("missing", {k: v for k, v in weights.items() if k != name}))
    with pytest.raises(FewbitsError, match=rf"{name} is \[172, 95\], the configuration wants \[172, 96\]"):
        fewbits.load(saved("misshapen", {**weights, name: weights[name][:, :95].contiguous()}))
    with pytest.raises(FewbitsError, match="has no parameter model.layers.9.extra"):
        fewbits.load(saved("foreign", {**weights, "model.layers.9.extra": torch.zeros(2)}))


def test_unknown_model_type_is_named(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "m")
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "model_type": "zorblax", "architectures": ["Z"]}))
    with pytest.raises(FewbitsError, match="zorblax.* is not known to transformers"):
        fewbits.load(tmp_path / "m")


def test_nothing_there() -> None:
    with pytest.raises(FewbitsError, match="no such file or directory"):
        fewbits.load("not/there/at/all")


def test_greedy_generation_equals_transformers(tiny: Path) -> None:
    session = Session(tiny)
    ids = session.encode("hello", raw=True)
    answer = session.generate(ids, max_tokens=12)
    want = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).generate(
        torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids):].tolist()
    assert answer.tokens == [t for t in want if t != 2]


def test_same_seed_same_text_and_context_limit(tiny: Path) -> None:
    session = Session(tiny)
    ids = session.encode("hello")
    one, two, other = (session.generate(ids, max_tokens=8, sampling=Sampling(temperature=1.0, seed=seed)).tokens
                       for seed in (5, 5, 6))
    assert one == two != other
    with pytest.raises(FewbitsError, match="prompt of 256 tokens, the model's context is 256"):
        session.generate([5] * 256)
