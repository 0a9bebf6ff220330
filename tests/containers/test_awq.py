"""AWQ directories against the layout worked by hand, and against a packing loop kept naive."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

import fewbits
from fewbits import codecs, containers
from fewbits.codecs.floats import F16
from fewbits.containers import base
from fewbits.containers.awq import Awq, to_file
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from tests.containers.intk import MODULE, NAME, checkpoint, directory, naive_values, random_layer, random_tensor

QUANTIZATION = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 8, "zero_point": True}


def naive_word(codes: list[int]) -> int:
    word = sum(codes[which] << 4 * place for place, which in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    return word - (1 << 32) if word >= 1 << 31 else word


def naive_pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes [n, out] to words [n, out / 8]."""
    return torch.tensor([[naive_word(row[i:i + 8]) for i in range(0, len(row), 8)] for row in codes.tolist()],
                        dtype=torch.int32)


def naive_files(codes, zeros, scales):
    return {"qweight": naive_pack(codes.t()), "qzeros": naive_pack(zeros.t()), "scales": scales.t().contiguous()}


def test_a_word_by_hand(tmp_path):
    """Eight rows of one column: codes 0 … 7 lie as 7 5 3 1 6 4 2 0 from the highest four bits down."""
    files = {"qweight": torch.tensor([[0x75316420]], dtype=torch.int32),
             "qzeros": torch.tensor([[0x11111110]], dtype=torch.int32), "scales": torch.full((1, 8), 0.5).half()}
    path = directory(tmp_path / "m", files, QUANTIZATION | {"group_size": -1})
    entry = Awq().read(path).entries[NAME]
    assert entry.codec == codecs.get("int4-row-asym") and entry.shape == (8, 1)
    assert entry.load().dequantize().flatten().tolist() == [0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group,shape", [(8, (16, 32)), (16, (8, 16)), (-1, (24, 7)), (32, (40, 96))])
def test_every_layout_against_the_naive_one(tmp_path, symmetric, group, shape):
    codes, zeros, scales = random_layer(4, group, symmetric, shape)
    theirs = naive_files(codes, zeros, scales)
    codec = codecs.get("int4-" + ("row" if group == -1 else f"g{group}") + ("" if symmetric else "-asym"))
    path = directory(tmp_path / "m", theirs, QUANTIZATION | {"group_size": group})
    entry = containers.open(path).entries[NAME]
    assert entry.codec == codec and entry.shape == shape
    assert torch.equal(entry.load().dequantize(), naive_values(codes, zeros, scales, group))
    ours = to_file(entry.load())
    assert ours.keys() == theirs.keys()
    for k in theirs:
        assert ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]), k


def test_written_and_read_back(tmp_path):
    data = torch.randn(3, 4).half()
    meant = checkpoint(tmp_path / "source", {
        NAME: random_tensor("int4-g16-asym", (16, 48)), "model.layers.0.mlp.down_proj.weight":
        random_tensor("int4-g16", (8, 32)), "model.layers.0.mlp.gate.weight": QTensor(F16, (3, 4), {"data": data}),
        "model.embed_tokens.weight": QTensor(F16, (3, 4), {"data": data})})
    got = base.write(Awq(), tmp_path / "out", meant)
    assert got.container == "awq" and got.facts["quantization_config"]["zero_point"] is True
    assert {n: e.codec.name for n, e in got.entries.items()} == {n: e.codec.name for n, e in meant.entries.items()}
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"] == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 16, "zero_point": True, "backend": "auto",
        "modules_to_not_convert": ["model.layers.0.mlp.gate"]}
    assert containers.detect(tmp_path / "out").name == "awq"


def test_quant_config_of_older_writers(tmp_path):
    codes, zeros, scales = random_layer(4, 8, False, (8, 16))
    path = directory(tmp_path / "m", naive_files(codes, zeros, scales))
    (path / "quant_config.json").write_text(json.dumps(
        {"zero_point": True, "q_group_size": 8, "w_bit": 4, "version": "GEMM"}))
    got = containers.open(path)
    assert got.container == "awq"
    assert torch.equal(got.entries[NAME].load().dequantize(), naive_values(codes, zeros, scales, 8))


def test_what_it_cannot_hold(tmp_path):
    def reason(codec, shape=(16, 64), name=NAME, others=()):
        tensors = {o: random_tensor("int4-g32", (8, 64)) for o in others} | {name: random_tensor(codec, shape)}
        source = checkpoint(tmp_path, tensors)
        return Awq().accepts(source, source.entries[name])

    assert reason("int4-g32") is None and reason("int4-row-asym") is None
    assert reason("int3-g32") == "AWQ has int4 in groups only"
    assert reason("int4-g32-sbf16") == "AWQ has scales in float16, not BF16"
    assert reason("int4-g32", (12, 64)) == "AWQ packs 8 rows into a word, and 12 is no multiple of 8"
    assert reason("int4-g32", (16, 80)) == "groups of 32 do not divide 80 columns"
    assert reason("int4-g128", (16, 64)) == "groups of 128 do not divide 64 columns"
    assert reason("int4-g16", others=["x.weight"]) == "AWQ has one group size in a model, and another layer is int4-g32"
    assert "embeddings" in reason("int4-g32", name="model.embed_tokens.weight")


def test_a_column_order_is_refused(tmp_path):
    tensor = random_tensor("int4-g16", (8, 32))
    ordered = QTensor(tensor.codec, tensor.shape, tensor.planes, torch.arange(31, -1, -1))
    with pytest.raises(FewbitsError, match="act-order"):
        base.write(Awq(), tmp_path / "out", checkpoint(tmp_path / "source", {NAME: ordered}))


def layer(**changes):
    files = naive_files(*random_layer(4, 8, False, (8, 16)))
    return {k: changes.get(k, lambda t: t)(t) for k, t in files.items() if changes.get(k, 0) is not None}


def put(value):
    def change(scales):
        scales[1, 2] = value
        return scales
    return change


HOSTILE = {
    "no qzeros": (layer(qzeros=None), {}, "qweight: needs .*qzeros, which is missing"),
    "no scales": (layer(scales=None), {}, "qweight: needs .*scales, which is missing"),
    "no qweight": (layer(qweight=None) | {"y.qweight": layer()["qweight"]}, {}, "missing"),
    "bits": (layer(), {"bits": 8}, "8 bits"),
    "version": (layer(), {"version": "gemv"}, "version 'gemv'"),
    "version of another kind": (layer(), {"version": 3}, "version 3"),
    "group of 0": (layer(), {"group_size": 0}, "groups of 0"),
    "group of another kind": (layer(), {"group_size": "8"}, "groups of '8'"),
    "group longer than the row": (layer(), {"group_size": 32}, "16 columns, which groups of 32 do not divide"),
    "group does not fit": (layer(), {"group_size": 4}, r"scales: \[2, 8\], where \[4, 8\] was expected"),
    "qzeros too short": (layer(qzeros=lambda t: t[:1]), {}, r"qzeros: \[1, 1\], where \[2, 1\] was expected"),
    "qweight of another type": (layer(qweight=lambda t: t.long()), {}, "qweight: I64"),
    "qweight of GPTQ's shape": (layer(qweight=lambda t: t.reshape(2, 8)), {}, "2 columns, which groups of 8"),
    "scales of another type": (layer(scales=lambda t: t.double()), {}, "scales: F64"),
    "infinite scale": (layer(scales=put(float("-inf"))), {}, r"scales: -inf at \[1, 2\]"),
    "NaN scale": (layer(scales=put(float("nan"))), {}, r"scales: nan at \[1, 2\]"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_directories_are_refused(tmp_path, case):
    files, changes, message = HOSTILE[case]
    path = directory(tmp_path / "m", files, QUANTIZATION | changes)
    with pytest.raises(FewbitsError, match=message) as error:
        Awq().read(path).entries[NAME].load()
    assert str(path) in str(error.value)


def test_zero_scales_are_zeros(tmp_path):
    path = directory(tmp_path / "m", layer(scales=torch.zeros_like), QUANTIZATION)
    assert not Awq().read(path).entries[NAME].load().dequantize().any()


def test_the_names_in_the_file(tmp_path):
    base.write(Awq(), tmp_path / "out", checkpoint(tmp_path / "source", {NAME: random_tensor("int4-g16", (8, 32))}))
    found = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    assert {k: (t.dtype, tuple(t.shape)) for k, t in found.items()} == {
        f"{MODULE}.qweight": (torch.int32, (32, 1)), f"{MODULE}.qzeros": (torch.int32, (2, 1)),
        f"{MODULE}.scales": (torch.float16, (2, 8))}


@pytest.mark.parametrize("container", ["awq", "compressed-tensors"])
def test_quantize_goes_there(tmp_path, tiny, container):
    with pytest.raises(FewbitsError, match="down_proj.*groups of 32 do not divide 172 columns"):
        fewbits.quantize(tiny, tmp_path / "no", "int4-g32", container=container, overrides=["*gate_proj*=f32",
                                                                                           "*up_proj*=f32"])
    result = fewbits.quantize(tiny, tmp_path / "out", "int4-g32", container=container, solver="nearest",
                              overrides=["*mlp*=f32"])
    assert result.container == container
    assert fewbits.load(tmp_path / "out")(torch.arange(4)[None]).logits.isfinite().all()
