"""The format "float-quantized" of compressed-tensors by hand; hostile files; what is written is read back."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from fewbits import codecs
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.floats import F16
from fewbits.containers import base
from fewbits.containers import open as open_model
from fewbits.containers.compressed import CompressedTensors
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.solvers import solve

NAME = "model.layers.0.mlp.up_proj.weight"
SCALE = f"{NAME}_scale"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}


def directory(path, tensors, weights=None):
    path.mkdir()
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"} | (weights or {})
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    (path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": settings}))
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def float8(*shape) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).to(torch.float8_e4m3fn)


def scales(*shape) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 1e-3 + 1e-4


BLOCKS = {"strategy": "block", "block_structure": [16, 16]}


@pytest.mark.parametrize("scale,weights,codec", [
    (scales(40, 1), {}, "fp8-e4m3"), (scales(40, 1).bfloat16(), {}, "fp8-e4m3"), (scales(40, 1).half(), {}, "fp8-e4m3"),
    (scales(1), {"strategy": "tensor"}, "fp8-e4m3"), (scales(), {"strategy": "tensor"}, "fp8-e4m3"),
    (scales(3, 2), BLOCKS, "fp8-e4m3-b16"), (scales(3, 2).bfloat16(), BLOCKS, "fp8-e4m3-b16"),
    (scales(40, 1), BLOCKS, "fp8-e4m3")])
def test_by_hand(tmp_path, scale, weights, codec):
    weight = float8(40, 24)
    entry = open_model(directory(tmp_path / "m", {NAME: weight, SCALE: scale}, weights)).entries[NAME]
    assert entry.codec.name == codec
    spread = scale.float()
    if spread.shape == (3, 2):
        spread = spread.repeat_interleave(16, 0).repeat_interleave(16, 1)[:40, :24]
    assert torch.equal(entry.load().dequantize(), weight.float() * spread)


def checkpoint(path, tensors: dict[str, QTensor]) -> Checkpoint:
    entries = {name: Entry(name, t.shape, t.codec, lambda t=t: t) for name, t in tensors.items()}
    return Checkpoint(path, "test", CONFIG, entries)


def random(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("other", [None, "int4-g32"])
def test_written_checked_and_read_back(tmp_path, other):
    tensors = {NAME: solve(random(40, 64), codecs.get("fp8-e4m3")),
               "model.layers.1.mlp.up_proj.weight": solve(random(40, 64), codecs.get("fp8-e4m3")),
               "model.embed_tokens.weight": QTensor(F16, (3, 4), {"data": random(3, 4).half()})}
    if other:
        tensors["model.layers.1.mlp.down_proj.weight"] = solve(random(40, 64), codecs.get(other))
    got = base.write(CompressedTensors(), tmp_path / "out", checkpoint(tmp_path / "s", tensors))
    for name, tensor in tensors.items():
        assert all(torch.equal(got.entries[name].load().planes[k], p) for k, p in tensor.planes.items())
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == ("mixed-precision" if other else "float-quantized")
    assert config["config_groups"]["group_0"] == {
        "targets": ["Linear"], "input_activations": None, "output_activations": None, "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel",
                    "group_size": None}}
    assert len(config["config_groups"]) == (2 if other else 1)
    found = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    assert found[NAME].dtype == torch.float8_e4m3fn and found[SCALE].dtype == torch.float32
    assert found[SCALE].shape == (40, 1)


@pytest.mark.parametrize("name", ["fp8-e5m2", "fp8-e4m3-b128", "kmeans4"])
def test_what_is_not_written(tmp_path, name):
    source = checkpoint(tmp_path / "s", {NAME: solve(random(40, 64), codecs.get(name))})
    with pytest.raises(FewbitsError, match="in groups only, and fp8-e4m3"):
        base.write(CompressedTensors(), tmp_path / "out", source)


HOSTILE = {
    "no scale": ({NAME: float8(40, 24)}, {}, f"needs {SCALE}, which is missing"),
    "no weight": ({SCALE: scales(40, 1)}, {}, "belongs to a quantized weight that is missing"),
    "scales across": ({NAME: float8(40, 24), SCALE: scales(1, 24)}, {}, r"F32 \[1, 24\], where .* \[40, 1\] or \[1\]"),
    "scales of another tile": ({NAME: float8(40, 24), SCALE: scales(2, 2)}, BLOCKS, r"\[2, 2\], where .* or \[3, 2\]"),
    "a tile of nothing": ({NAME: float8(40, 24), SCALE: scales(3, 2)}, {"block_structure": [0, 0]}, r"\[3, 2\], where"),
    "integers": ({NAME: float8(40, 24), SCALE: torch.ones(40, 1, dtype=torch.int32)}, {}, "I32 .*, where F16"),
    "a vector": ({NAME: float8(40), SCALE: scales(1)}, {}, "where a matrix was expected"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_at_opening(tmp_path, case):
    files, weights, message = HOSTILE[case]
    with pytest.raises(FewbitsError, match=message):
        open_model(directory(tmp_path / "m", files, weights))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(tmp_path, value):
    scale = scales(40, 1)
    scale[7] = value
    entry = open_model(directory(tmp_path / "m", {NAME: float8(40, 24), SCALE: scale})).entries[NAME]
    with pytest.raises(FewbitsError, match=rf"{SCALE}: (nan|inf) at \[7, 0\]"):
        entry.load()
