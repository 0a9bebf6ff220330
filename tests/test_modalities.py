"""Models of sound, images and words, quantized as they are: with and without batches of their own inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

import fewbits
from fewbits.errors import FewbitsError
from fewbits.runtime.linear import QLinear
from tests.calibration.test_walk import MODELS as WALKED
from tests.calibration.test_walk import SMALL, TEXT, Batches, ids, images

EYES = {**SMALL, "image_size": 28, "patch_size": 14}


def _pairs() -> Batches:
    return [{"input_ids": i["input_ids"], "pixel_values": p["pixel_values"][:1]}
            for i, p in zip(ids(2, 12), images(), strict=True)]


def _waves() -> Batches:
    torch.manual_seed(1)
    return [{"input_values": torch.randn(1, 800)} for _ in range(2)]


MODELS: dict[str, Any] = WALKED | {
    "bert-bare": (t.BertModel, lambda: t.BertConfig(**TEXT), lambda: ids(3, 12)),
    "gpt2-bare": (t.GPT2Model, lambda: t.GPT2Config(vocab_size=90, n_embd=64, n_layer=2, n_head=4, n_positions=64),
                  lambda: ids(2, 20)),
    "openai-gpt": (t.OpenAIGPTLMHeadModel, lambda: t.OpenAIGPTConfig(
        vocab_size=90, n_embd=64, n_layer=2, n_head=4, n_positions=64), lambda: ids(2, 20)),  # Conv1D, not in the table
    "deit": (t.DeiTForImageClassification, lambda: t.DeiTConfig(**EYES), images),  # older names in its files
    "dinov2": (t.Dinov2Model, lambda: t.Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14), images),
    "clip": (t.CLIPModel, lambda: t.CLIPConfig(  # a scalar among its parameters
        text_config={**SMALL, "vocab_size": 90, "eos_token_id": 2}, vision_config=EYES, projection_dim=32), _pairs),
    "siglip": (t.SiglipModel, lambda: t.SiglipConfig(  # torch's own MultiheadAttention
        text_config={**SMALL, "vocab_size": 90, "max_position_embeddings": 64}, vision_config=EYES), _pairs),
    "wav2vec2": (t.Wav2Vec2ForCTC, lambda: t.Wav2Vec2Config(  # no embeddings; a norm of weights
        **SMALL, vocab_size=90, conv_dim=(32, 32), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4), _waves),
}
LEFT = {"whisper": 1, "vit": 1, "bert": 1, "gpt2": 1, "gptj": 1, "llama": 1, "t5": 1, "blip2": 1, "openai-gpt": 1,
        "siglip": 1}  # linear layers that stay in floats: heads, and attention that multiplies by itself
# relative error of outputs, largest measured on these random models and a half: int8 0.036, nf4 0.32
MOST = {"int8": 0.054, "nf4": 0.48, "int4-g32": 0.48}


def output(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = model(**batch).to_tuple()
    return torch.cat([x.reshape(-1) for x in found if isinstance(x, torch.Tensor) and x.is_floating_point()])


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path, Batches]:
    kind, config, batches = MODELS[request.param]
    torch.manual_seed(0)
    model = kind(config()).eval()
    path = tmp_path_factory.mktemp(request.param) / "m"
    model.save_pretrained(path)
    return request.param, model, path, batches()


def test_every_linear_layer_in_8_and_4_bits(family: tuple[str, Any, Path, Batches], tmp_path: Path) -> None:
    name, model, path, batches = family
    want = output(model, batches[0])
    torch.testing.assert_close(output(fewbits.load(path), batches[0]), want)
    linear = sum(isinstance(m, (torch.nn.Linear, Conv1D)) for m in model.modules())
    for recipe, most in MOST.items():
        out = fewbits.quantize(path, tmp_path / recipe, recipe, calibration="none").path
        net = fewbits.load(out)
        assert sum(isinstance(m, QLinear) for m in net.modules()) == linear - LEFT.get(name, 0)
        assert 0 < float((output(net, batches[0]) - want).norm() / want.norm()) < most, recipe


def test_gptq_on_batches_of_own_inputs(family: tuple[str, Any, Path, Batches], tmp_path: Path) -> None:
    _, _, path, batches = family
    found = fewbits.quantize(path, tmp_path / "m", "int4-g32", calibration=batches)
    plain = fewbits.quantize(path, tmp_path / "plain", "int4-g32", solver="search", calibration=batches)
    by_gptq = {row["name"]: row["error"] for row in found.tensors if row.get("solver") == "gptq"}
    assert len(by_gptq) >= 8
    errors = {row["name"]: row["error"] for row in plain.tensors if row["name"] in by_gptq}
    assert sum(by_gptq.values()) < 0.8 * sum(errors.values()), "outputs of the layers, on the batches"


def test_a_file_of_inputs(tmp_path: Path) -> None:
    kind, config, batches = MODELS["whisper"]
    kind(config()).save_pretrained(tmp_path / "m")
    heard = torch.cat([b["input_features"] for b in batches()])
    save_file({"input_features": heard, "decoder_input_ids": torch.randint(3, 90, (2, 6))}, tmp_path / "in.safetensors")
    found = fewbits.quantize(tmp_path / "m", tmp_path / "out", "nf4", calibration=tmp_path / "in.safetensors")
    assert "2 x decoder_input_ids, input_features" in str(found.calibration)
    assert sum(row.get("solver") == "gptq" for row in found.tensors) == 37  # all but fc2, where blocks cross rows


def test_w8a8_of_a_model_without_text(tmp_path: Path) -> None:
    kind, config, batches = MODELS["bert-bare"]
    torch.manual_seed(0)
    model = kind(config()).eval()
    model.save_pretrained(tmp_path / "m")
    found = fewbits.quantize(tmp_path / "m", tmp_path / "out", "w8a8-static", calibration=batches())
    assert "pooler.dense.weight: w8a8 instead of w8a8-static: it lies in no block" in found.notes
    want = output(model, batches()[0])
    assert 0 < float((output(fewbits.load(found.path), batches()[0]) - want).norm() / want.norm()) < 0.1
    with pytest.raises(FewbitsError, match="as w8a8-static: its scale of activations is found by calibration"):
        fewbits.quantize(tmp_path / "m", tmp_path / "none", "w8a8-static", calibration="none")
    with pytest.raises(FewbitsError, match="as w8a8-static: its scale of activations is found by calibration"):
        fewbits.load(tmp_path / "m", recipe="w8a8-static")
