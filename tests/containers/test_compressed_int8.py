"""compressed-tensors' int8 with rounded activations: bytes, what is read of the configuration, hostile files."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fewbits import codecs, containers
from fewbits.codecs.floats import F16
from fewbits.containers import base
from fewbits.containers.compressed import CompressedTensors
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from tests.containers.intk import NAME, checkpoint, directory

WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
LAYER = TOKEN | {"strategy": "tensor", "dynamic": False}
MODULE = NAME.removesuffix(".weight")


def quantization(*groups: dict[str, Any]) -> dict[str, Any]:
    made = {f"group_{i}": {"targets": ["Linear"], "weights": WEIGHTS} | group for i, group in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": made}


def layer(**changes: Any) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (6, 40), generator=draw, dtype=torch.int8)
    made: dict[str, Any] = {"weight": codes, "weight_scale": torch.rand(6, 1, generator=draw) + 0.1,
                            "input_scale": torch.tensor([0.25])} | changes
    return {k: v for k, v in made.items() if v is not None}


def read(path: Any) -> QTensor:
    return containers.open(path).entries[NAME].load()


@pytest.mark.parametrize(("said", "name"), [(TOKEN, "w8a8-sf32"), (LAYER, "w8a8-static-sf32"),
                                            (None, "int8-row-sf32"), (TOKEN | {"symmetric": False}, "int8-row-sf32"),
                                            (TOKEN | {"num_bits": 4}, "int8-row-sf32")])
def test_what_becomes_of_activations(tmp_path, said, name):
    files = layer()
    found = containers.open(directory(tmp_path / "m", files, quantization({"input_activations": said})))
    q = found.entries[NAME].load()
    assert q.codec == codecs.get(name) and not found.buffers
    assert torch.equal(q.dequantize(), files["weight"].float() * files["weight_scale"])
    if "static" in name:
        assert q.planes["inputs"].tolist() == [[0.25]] * 6


def test_the_group_of_a_layer_is_found_by_its_name(tmp_path):
    other = {"targets": ["re:.*k_proj"], "input_activations": TOKEN}
    named = {"targets": [f"re:.*{MODULE.rpartition('.')[2]}$"], "input_activations": LAYER}
    for i, (groups, want) in enumerate([((other, named), True), ((named, other), True),
                                        (({"input_activations": TOKEN}, named), True),
                                        (({"input_activations": TOKEN}, other), False)]):
        codec = read(directory(tmp_path / str(i), layer(), quantization(*groups))).codec
        assert codec == codecs.get("w8a8-static-sf32" if want else "w8a8-sf32")


def test_written_and_read_back(tmp_path):
    kinds = ["w8a8", "w8a8", "w8a8-static-sbf16", "w8a8-asym", "int4-g8"]
    tensors = {}
    for i, kind in enumerate(kinds):
        codec, shape = codecs.get(kind), (10, 96)
        planes = {k: torch.randint(-100, 100, s).to(getattr(torch, d)) for k, (d, s) in codec.planes(shape).items()}
        planes |= {"inputs": torch.full((10, 1), 0.5)} if "inputs" in planes else {}
        tensors[f"model.layers.{i}.mlp.up_proj.weight"] = QTensor(codec, shape, planes)
    tensors["model.embed_tokens.weight"] = QTensor(F16, (3, 4), {"data": torch.randn(3, 4).half()})
    meant = checkpoint(tmp_path / "source", tensors)
    got = base.write(CompressedTensors(), tmp_path / "out", meant)
    assert {n: e.codec.name for n, e in got.entries.items()} == {n: e.codec.name for n, e in meant.entries.items()}
    for name, q in tensors.items():
        again = got.entries[name].load()
        assert all(torch.equal(again.planes[k], q.planes[k]) for k in q.planes), name
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    groups = config["config_groups"]
    assert config["format"] == "mixed-precision" and config["ignore"] == ["lm_head"]
    assert groups["group_0"] == {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": TOKEN,
                                 "output_activations": None, "format": "int-quantized"}
    assert [g["input_activations"] for g in groups.values()] == [TOKEN, LAYER, TOKEN, None]
    assert groups["group_1"]["targets"] == ["model.layers.2.mlp.up_proj"]


HOSTILE = {
    "no scale of inputs": (layer(input_scale=None), LAYER, "needs .*input_scale, which is missing"),
    "a scale for each input": (layer(input_scale=torch.ones(40)), LAYER, r"input_scale: F32 \[40\]"),
    "a negative scale": (layer(input_scale=torch.tensor([-0.5])), LAYER, "input_scale: a scale of -0.5"),
    "a scale of zero": (layer(input_scale=torch.zeros(1)), LAYER, "input_scale: a scale of 0"),
    "NaN": (layer(input_scale=torch.tensor([float("nan")])), LAYER, "input_scale: nan"),
    "no scale": (layer(weight_scale=None), TOKEN, "needs .*weight_scale, which is missing"),
    "many scales": (layer(weight_scale=torch.ones(6, 2)), TOKEN, r"weight_scale: F32 \[6, 2\]"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_directories_are_refused(tmp_path, case):
    files, said, message = HOSTILE[case]
    with pytest.raises(FewbitsError, match=message):
        read(directory(tmp_path / "m", files, quantization({"input_activations": said})))


@pytest.mark.parametrize("targets", [["re:("], [3], 7])
def test_targets_that_are_none(tmp_path, targets):
    group = {"targets": targets, "input_activations": TOKEN}
    with pytest.raises(FewbitsError, match="targets"):
        read(directory(tmp_path / "m", layer(), quantization(group)))


def test_other_layouts_have_no_place_for_it(tmp_path):
    codec = codecs.get("w8a8")
    planes = {k: torch.zeros(s, dtype=getattr(torch, d)) for k, (d, s) in codec.planes((16, 64)).items()}
    source = checkpoint(tmp_path, {NAME: QTensor(codec, (16, 64), planes)})
    for name in ("gptq", "awq", "bitsandbytes"):
        assert containers.by_name(name).accepts(source, source.entries[NAME])
    assert containers.by_name("fewbits").accepts(source, source.entries[NAME]) is None
