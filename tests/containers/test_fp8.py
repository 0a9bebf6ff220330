"""Transformers' fine-grained FP8 against its own dequantization; hostile files; what is written is read back."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
import transformers
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from fewbits import codecs
from fewbits import quantize as quantize_model
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.floats import F16
from fewbits.containers import base
from fewbits.containers import open as open_model
from fewbits.containers.fp8 import Fp8
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.solvers import solve

MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"
SCALE = f"{NAME}_scale_inv"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}


def directory(path, tensors, **changes):
    path.mkdir()
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]} | changes
    (path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": settings}))
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def float8(*shape, dtype=torch.float8_e4m3fn) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)


def scales(*shape) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 1e-3 + 1e-4


@pytest.mark.parametrize("shape", [(128, 128), (384, 256), (2, 256, 128)])
@pytest.mark.parametrize("kind", ["F32", "BF16", "F8_E8M0", "U8"])
def test_values_are_those_of_transformers(tmp_path, shape, kind):
    weight, grid = float8(*shape), (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
    scale = scales(*grid)
    if kind == "BF16":
        scale = scale.bfloat16()
    elif kind != "F32":
        exponents = torch.randint(0, 255, grid, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
        scale = exponents if kind == "U8" else exponents.view(torch.float8_e8m0fnu)
    path = directory(tmp_path / "m", {NAME: weight, SCALE: scale})
    entry = open_model(path).entries[NAME]
    assert entry.codec == codecs.get("fp8-e4m3-b128") and entry.shape == shape
    meant = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(entry.load().dequantize(), meant)


def test_cut_tiles_by_hand(tmp_path):
    weight, scale = float8(200, 300), scales(2, 3)
    got = open_model(directory(tmp_path / "m", {NAME: weight, SCALE: scale})).entries[NAME].load().dequantize()
    for i in range(2):
        for j in range(3):
            tile = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            assert torch.equal(got[tile], weight[tile].float() * scale[i, j])


@pytest.mark.parametrize("scale", [torch.tensor(0.25), torch.tensor([0.25])])
def test_one_scale_for_a_tensor(tmp_path, scale):
    weight = float8(6, 10)
    path = directory(tmp_path / "m", {NAME: weight, SCALE: scale, f"{MODULE}.activation_scale": torch.tensor(1.0)},
                     weight_block_size=None, activation_scheme="static")
    got = open_model(path)
    assert not got.buffers and got.entries[NAME].codec == codecs.get("fp8-e4m3")
    assert torch.equal(got.entries[NAME].load().dequantize(), weight.float() / 4)


def test_e5m2(tmp_path):
    weight, scale = float8(6, 10, dtype=torch.float8_e5m2), torch.tensor([[0.5]])
    entry = open_model(directory(tmp_path / "m", {NAME: weight, SCALE: scale})).entries[NAME]
    assert entry.codec == codecs.get("fp8-e5m2-b128")
    assert torch.equal(entry.load().dequantize(), weight.float() / 2)


def test_codes_for_nan_decode_to_nan(tmp_path):
    weight = torch.full((2, 4), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    path = directory(tmp_path / "m", {NAME: weight, SCALE: torch.ones(1, 1)})
    assert open_model(path).entries[NAME].load().dequantize().isnan().all()


def test_transformers_loads_what_is_written(tiny, tmp_path):
    """On a CPU it decodes; every value is ours."""
    quantize_model(tiny, tmp_path / "out", "fp8-e4m3-b4")  # tiles that divide its widths: cut ones it refuses on a CPU
    meant = open_model(tmp_path / "out")
    assert meant.container == "fp8" and meant.entries[NAME].codec.name == "fp8-e4m3-b4"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    found = dict(model.named_parameters())
    assert len(found) == len(meant.entries)
    for name, entry in meant.entries.items():
        assert torch.equal(found[name], entry.load().dequantize()), name
    quantized = [n for n, e in meant.entries.items() if e.codec.family == "fp8-tiles"]
    assert len(quantized) == 14


def checkpoint(path, tensors: dict[str, QTensor], **config) -> Checkpoint:
    entries = {name: Entry(name, t.shape, t.codec, lambda t=t: t) for name, t in tensors.items()}
    return Checkpoint(path, "test", CONFIG | config, entries)


def random(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(128, 128), (300, 256), (5, 128), (1, 384)])
def test_written_checked_and_read_back(tmp_path, shape):
    data = QTensor(F16, (3, 4), {"data": random(3, 4).half()})
    source = checkpoint(tmp_path / "s", {
        NAME: solve(random(*shape), codecs.get("fp8-e4m3-b128")), "model.layers.0.mlp.gate.weight": data,
        "model.layers.0.mlp.experts.w1.weight": solve(random(3, 200, 256), codecs.get("fp8-e4m3-b128"))})
    got = base.write(Fp8(), tmp_path / "out", source)
    for name, entry in source.entries.items():
        assert got.entries[name].codec == entry.codec
        assert torch.equal(got.entries[name].load().dequantize(), entry.load().dequantize())
    found = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    assert found[NAME].dtype == torch.float8_e4m3fn and found[NAME].shape == shape
    assert found["model.layers.0.mlp.experts.2.w1.weight_scale_inv"].shape == (2, 2)
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"] == {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["model.layers.0.mlp.gate", "lm_head"]}
    base.write(Fp8(), tmp_path / "again", got)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


REFUSED = {
    "fp8-e4m3": "with a scale a tile only", "fp8-e5m2-b128": "with a scale a tile only",
    "nf4": "with a scale a tile only",
    "fp8-e4m3-b64": "all tiles have one size in this layout, and first.weight is fp8-e4m3-b128",
    "fp8-e4m3-b128": "tiles of 128 do not divide 192 columns"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_written(tmp_path, name):
    source = checkpoint(tmp_path / "s", {"first.weight": solve(random(4, 128), codecs.get("fp8-e4m3-b128")),
                                         NAME: solve(random(4, 192), codecs.get(name))})
    with pytest.raises(FewbitsError, match=REFUSED[name]):
        base.write(Fp8(), tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


def test_embeddings_are_not_written(tmp_path):
    tensor = solve(random(4, 128), codecs.get("fp8-e4m3-b128"))
    source = checkpoint(tmp_path / "s", {"model.embed_tokens.weight": tensor})
    with pytest.raises(FewbitsError, match="embeddings in floats"):
        base.write(Fp8(), tmp_path / "out", source)


GOOD = {NAME: float8(200, 130), SCALE: scales(2, 2)}
HOSTILE = {
    "no scale": ({NAME: GOOD[NAME]}, {}, f"{NAME}: needs {SCALE}, which is missing"),
    "no weight": ({SCALE: GOOD[SCALE]}, {}, "belongs to a weight that is missing"),
    "a weight in floats": (GOOD | {NAME: torch.ones(200, 130)}, {}, "a weight that is missing, or not in float8"),
    "a row of scales": (GOOD | {SCALE: scales(2, 1)}, {}, r"\[2, 1\], where \[2, 2\] was expected"),
    "too many scales": (GOOD | {SCALE: scales(3, 2)}, {}, r"\[3, 2\], where \[2, 2\] was expected"),
    "flat scales": (GOOD | {SCALE: scales(4)}, {}, r"\[4\], where \[2, 2\]"),
    "scales of another tile": (GOOD, {"weight_block_size": [64, 64]}, r"\[2, 2\], where \[4, 3\] .* tiles of 64 x 64"),
    "scales where one was meant": (GOOD, {"weight_block_size": None}, r"\[2, 2\], where \[\] was expected"),
    "integers for scales": (GOOD | {SCALE: torch.ones(2, 2, dtype=torch.int32)}, {}, "I32 .* where F32 was expected"),
    "a vector": ({NAME: float8(8), SCALE: scales(1)}, {}, r"F8_E4M3 \[8\], where a matrix"),
    "oblong tiles": (GOOD, {"weight_block_size": [1, 128]}, "tiles of 1 x 128 weights are not read"),
    "tiles of nothing": (GOOD, {"weight_block_size": [0, 0]}, r"weight_block_size \[0, 0\]"),
    "one number": (GOOD, {"weight_block_size": 128}, "weight_block_size 128"),
    "text": (GOOD, {"weight_block_size": ["128", "128"]}, "weight_block_size"),
    "true": (GOOD, {"weight_block_size": [True, True]}, "weight_block_size"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_at_opening(tmp_path, case):
    files, changes, message = HOSTILE[case]
    with pytest.raises(FewbitsError, match=message):
        open_model(directory(tmp_path / "m", files, **changes))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scales_that_are_no_numbers(tmp_path, value):
    scale = scales(2, 2)
    scale[1, 0] = value
    entry = open_model(directory(tmp_path / "m", GOOD | {SCALE: scale})).entries[NAME]
    with pytest.raises(FewbitsError, match=rf"{SCALE}: -?(nan|inf) at \[1, 0\]"):
        entry.load()


def test_a_power_that_is_none(tmp_path):
    exponents = torch.tensor([[127, 255], [0, 1]], dtype=torch.uint8)
    entry = open_model(directory(tmp_path / "m", GOOD | {SCALE: exponents})).entries[NAME]
    with pytest.raises(FewbitsError, match="a scale is NaN"):
        entry.load()


def test_scales_of_zero_and_below(tmp_path):
    scale = torch.tensor([[0.0, -1.0], [1.0, 1e-44]])
    got = open_model(directory(tmp_path / "m", GOOD | {SCALE: scale})).entries[NAME].load().dequantize()
    assert (got[:128, :128] == 0).all() and torch.equal(got[:128, 128:], -GOOD[NAME][:128, 128:].float())
    assert got.isfinite().all()
