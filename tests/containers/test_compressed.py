"""compressed-tensors directories against the layout worked by hand, and against packing loops kept naive."""

from __future__ import annotations

import json

import pytest
import torch

from fewbits import codecs, containers
from fewbits.codecs.floats import F16
from fewbits.containers import base
from fewbits.containers.compressed import CompressedTensors, to_file
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from tests.containers.intk import NAME, checkpoint, directory, naive_values, qtensor, random_layer, random_tensor


def weights(bits=4, group=8, symmetric=True):
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel" if group == -1 else "group",
            "group_size": None if group == -1 else group}


def quantization(*kinds, **changes):
    groups = {f"group_{i}": {"targets": ["Linear"], "weights": kind} for i, kind in enumerate(kinds or [weights()])}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups} | changes


def naive_words(codes: list[int], bits: int) -> list[int]:
    stream = sum(code << i * bits for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    found = [stream >> 32 * i & 0xFFFFFFFF for i in range(count)]
    return [w - (1 << 32) if w >= 1 << 31 else w for w in found]


def naive_files(codes, zeros, scales, bits, symmetric):
    pack = [naive_words(row, bits) for row in codes.tolist()]
    files = {"weight_packed": torch.tensor(pack, dtype=torch.int32), "weight_scale": scales,
             "weight_shape": torch.tensor(codes.shape)}
    if not symmetric:
        down = [naive_words(column, bits) for column in zeros.t().tolist()]
        files["weight_zero_point"] = torch.tensor(down, dtype=torch.int32).t().contiguous()
    return files


def load(path):
    return containers.open(path).entries[NAME].load()


def test_a_word_by_hand(tmp_path):
    """Eight 4-bit codes -8 … -1, stored with 8 added, lowest first; the scale one half."""
    files = {"weight_packed": torch.tensor([[0x76543210]], dtype=torch.int32),
             "weight_scale": torch.tensor([[0.5]]).half(), "weight_shape": torch.tensor([1, 8])}
    got = load(directory(tmp_path / "m", files, quantization()))
    assert got.codec == codecs.get("int4-g8")
    assert got.dequantize().tolist() == [[-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group,shape", [(8, (16, 32)), (16, (5, 48)), (-1, (7, 33)), (32, (3, 32))])
def test_every_layout_against_the_naive_one(tmp_path, bits, symmetric, group, shape):
    codes, zeros, scales = random_layer(bits, group, symmetric, shape)
    theirs = naive_files(codes, zeros, scales, bits, symmetric)
    got = load(directory(tmp_path / "m", theirs, quantization(weights(bits, group, symmetric))))
    assert got.codec.name == f"int{bits}-" + ("row" if group == -1 else f"g{group}") + ("" if symmetric else "-asym")
    assert torch.equal(got.dequantize(), naive_values(codes, zeros, scales, group))
    ours = {f"weight_{k}": v for k, v in to_file(got).items()}
    assert ours.keys() == theirs.keys()
    for k in theirs:
        assert ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]), k


def test_written_and_read_back(tmp_path):
    data = torch.randn(3, 4).half()
    kinds = ["int4-g16-asym", "int4-g16-asym", "int8-row", "int3-g32", "int2-g8-asym-sbf16"]
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": random_tensor(kind, (10, 96), i) for i, kind in enumerate(kinds)}
    tensors |= {n: QTensor(F16, (3, 4), {"data": data}) for n in ("model.layers.0.mlp.gate.weight",
                                                                  "model.embed_tokens.weight")}
    meant = checkpoint(tmp_path / "source", tensors)
    got = base.write(CompressedTensors(), tmp_path / "out", meant)
    assert {n: e.codec.name for n, e in got.entries.items()} == {n: e.codec.name for n, e in meant.entries.items()}
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["model.layers.0.mlp.gate", "lm_head"] and config["format"] == "pack-quantized"
    assert [g["targets"] for g in config["config_groups"].values()] == [
        ["Linear"], *([f"model.layers.{i}.mlp.up_proj"] for i in (2, 3, 4))]
    assert config["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": False, "dynamic": False, "strategy": "group", "group_size": 16}
    assert config["config_groups"]["group_1"]["weights"]["strategy"] == "channel"
    assert containers.detect(tmp_path / "out").name == "compressed-tensors"


@pytest.mark.parametrize("given", [False, True])
def test_the_group_of_each_column(tmp_path, given):
    """The first versions of the format had act-order by group; -1 says that it was not used."""
    codes, zeros, scales = random_layer(4, 8, True, (8, 32))
    files = naive_files(codes, zeros, scales, 4, True)
    g_idx = torch.arange(32)[torch.randperm(32, generator=torch.Generator().manual_seed(0))] // 8
    files["weight_g_idx"] = (g_idx if given else torch.full((32,), -1)).int()
    meant = scales.float()[:, g_idx if given else torch.arange(32) // 8] * (codes.float() - 8)
    got = load(directory(tmp_path / "m", files, quantization()))
    assert torch.equal(got.dequantize(), meant) and (got.order is not None) == given
    if given:
        with pytest.raises(FewbitsError, match="act-order"):
            base.write(CompressedTensors(), tmp_path / "out", containers.open(tmp_path / "m"))


def test_zero_points_that_are_not_packed(tmp_path):
    codes, zeros, scales = random_layer(4, 8, False, (5, 32))
    files = naive_files(codes, zeros, scales, 4, False)
    path = directory(tmp_path / "m", files | {"weight_zero_point": (zeros - 8).to(torch.int8)},
                     quantization(weights(symmetric=False)))
    assert torch.equal(load(path).dequantize(), naive_values(codes, zeros, scales, 8))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale", [(6, 1), (1,)])
def test_int8_without_packing(tmp_path, symmetric, scale):
    codes, zeros, _ = random_layer(8, -1, symmetric, (6, 9))
    scales = torch.randn(scale).bfloat16()
    files = {"weight": (codes - 128).to(torch.int8), "weight_scale": scales, "input_scale": torch.ones(1),
             "input_zero_point": torch.zeros(1, dtype=torch.int8)}
    if not symmetric:
        files["weight_zero_point"] = (zeros - 128).to(torch.int8)
    found = containers.open(directory(tmp_path / "m", files, quantization(weights(8, -1, symmetric),
                                                                          format="int-quantized")))
    assert list(found.entries) == [NAME] and not found.buffers
    assert torch.equal(found.entries[NAME].load().dequantize(), naive_values(codes, zeros, scales.expand(6, 1), -1))


def test_a_layer_finds_its_group_by_its_shapes(tmp_path):
    codes, zeros, scales = random_layer(8, 16, True, (6, 32))
    path = directory(tmp_path / "m", naive_files(codes, zeros, scales, 8, True),
                     quantization(weights(4, 16), weights(8, 16), weights(8, -1), weights(8, 16, False)))
    assert load(path).codec.name == "int8-g16"


def test_what_it_cannot_hold(tmp_path):
    def reason(codec, shape=(16, 64), name=NAME):
        source = checkpoint(tmp_path, {name: random_tensor(codec, shape)})
        return CompressedTensors().accepts(source, source.entries[name])

    assert reason("int3-g32-asym-sf32") is None and reason("int8-row", (5, 7)) is None
    assert reason("int4-g32", (16, 80)) == "groups of 32 do not divide 80 columns"
    assert "embeddings" in reason("int4-g32", name="model.embed_tokens.weight")
    source = checkpoint(tmp_path, {NAME: random_tensor("int4-g32", (16, 64))})
    assert "int2, int3, int4 and int8" in CompressedTensors().accepts(
        source, source.entries[NAME].as_(codec=codecs.get("nf4")))


def layer(symmetric=True, **changes):
    files = naive_files(*random_layer(4, 8, symmetric, (8, 16)), 4, symmetric)
    made = {k: changes.get(k, lambda t: t)(t) for k, t in files.items() if changes.get(k, 0) is not None}
    return made | {k: c for k, c in changes.items() if isinstance(c, torch.Tensor)}


def put(value):
    def change(scales):
        scales[1, 1] = value
        return scales
    return change


HOSTILE = {
    "no scale": (layer(weight_scale=None), quantization(), "needs .*weight_scale, which is missing"),
    "no shape": (layer(weight_shape=None), quantization(), "needs .*weight_shape, which is missing"),
    "no weight": (layer(weight_packed=None, weight_shape=None), quantization(), "weight_scale: belongs to"),
    "shape of three": (layer(weight_shape=lambda t: torch.tensor([8, 16, 1])), quantization(), r"shape: I64 \[3\]"),
    "shape of 0": (layer(weight_shape=lambda t: t * 0), quantization(), r"a weight of \[0, 0\]"),
    "negative shape": (layer(weight_shape=lambda t: -t), quantization(), r"a weight of \[-8, -16\]"),
    "huge shape": (layer(weight_shape=lambda t: t << 58), quantization(), r"packed: \[8, 2\], where \[2305"),
    "other shape": (layer(weight_shape=lambda t: t * 2), quantization(), r"packed: \[8, 2\], where \[16, 4\]"),
    "packed of another type": (layer(weight_packed=lambda t: t.to(torch.uint8)), quantization(), "packed: U8"),
    "bits": (layer(), quantization(weights(bits=5)), "group_0: 5 bits"),
    "bits do not fit": (layer(), quantization(weights(bits=8)), r"packed: \[8, 2\], where \[8, 4\]"),
    "group of 0": (layer(), quantization(weights(group=0)), "groups of 0"),
    "group does not fit": (layer(), quantization(weights(group=4)), r"scale: \[8, 2\], where \[8, 4\]"),
    "group longer than the row": (layer(), quantization(weights(group=32)), r"scale: \[8, 2\], where \[8, 1\]"),
    "zero points too many": (layer(False), quantization(), "is asymmetric, and no group"),
    "no zero points": (layer(), quantization(weights(symmetric=False)), "is symmetric, and no group"),
    "zero points too short": (layer(False, weight_zero_point=lambda t: t[:, :1]),
                              quantization(weights(symmetric=False)), r"zero_point: \[1, 1\], where \[1, 2\]"),
    "zero points out of range": (layer(False, weight_zero_point=lambda t: torch.full((8, 2), 9, dtype=torch.int8)),
                                 quantization(weights(symmetric=False)), "zero points from 9 to 9 in 4 bits"),
    "g_idx out of range": (layer(weight_g_idx=torch.arange(16).int()), quantization(), "groups 0 to 15, where there"),
    "g_idx too short": (layer(weight_g_idx=torch.zeros(8).int()), quantization(), r"g_idx: \[8\], where \[16\]"),
    "infinite scale": (layer(weight_scale=put(float("inf"))), quantization(), r"scale: inf at \[1, 1\]"),
    "NaN scale": (layer(weight_scale=put(float("nan"))), quantization(), r"scale: nan at \[1, 1\]"),
    "format": (layer(), quantization(format="marlin-24"), "format 'marlin-24'"),
    "format of another kind": (layer(), quantization(format=["pack-quantized"]), "format"),
    "sparse": (layer(), quantization(sparsity_config={"format": "sparse-bitmask"}), "format 'sparse-bitmask'"),
    "rotated": (layer(), quantization(transform_config={"config_groups": {"u": {}}}), "transform_config"),
    "no groups": (layer(), quantization(config_groups=None), "config_groups None"),
    "groups by name": (layer(), quantization(config_groups={"W4A16": ["Linear"]}), "config_groups"),
    "weights of another kind": (layer(), quantization(3), "weights 3"),
    "no int weights": (layer(), quantization(config_groups={}), "no group of the configuration has int weights"),
    "int8 of many scales": ({"weight": torch.zeros(4, 8, dtype=torch.int8), "weight_scale": torch.ones(4, 2)},
                            quantization(weights(8, 4), format="int-quantized"), r"weight_scale: F32 \[4, 2\]"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_directories_are_refused(tmp_path, case):
    files, settings, message = HOSTILE[case]
    path = directory(tmp_path / "m", {k: v.contiguous() for k, v in files.items()}, settings)
    with pytest.raises(FewbitsError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_zero_scales_are_zeros(tmp_path):
    path = directory(tmp_path / "m", layer(weight_scale=torch.zeros_like), quantization())
    assert not load(path).dequantize().any()


def test_a_tiny_layer_that_fits_two_widths_is_refused(tmp_path):
    files = naive_files(*random_layer(4, -1, True, (3, 8)), 4, True)
    path = directory(tmp_path / "m", files, quantization(weights(4, -1), weights(3, -1)))
    with pytest.raises(FewbitsError, match="4 or 3 bits"):
        load(path)


def test_signed_codes(tmp_path):
    """-8 … 7 as the format means them are our 0 … 15 around a zero point of 8."""
    codes = torch.arange(16).reshape(1, 16)
    files = to_file(qtensor(codecs.get("int4-row"), codes, torch.tensor([[8]]), torch.ones(1, 1).half()))
    assert files["packed"].tolist() == [[0x76543210, 0xFEDCBA98 - (1 << 32)]]
