"""GPTQ directories against layouts worked by hand and against the packing loops of the original code, kept naive."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest
import safetensors.torch
import torch

from fewbits import codecs
from fewbits.codecs.floats import F16
from fewbits.containers import base
from fewbits.containers.directory import TransformersDirectory
from fewbits.containers.gptq import Gptq, to_file
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from tests.containers.intk import CONFIG, MODULE, NAME, checkpoint, naive_values, qtensor
from tests.containers.intk import random_layer as any_layer

random_layer = partial(any_layer, zero=False)  # version 1 has no zero points of 0


def naive_pack(codes: list[int], bits: int) -> list[int]:
    """Words of one column, code by code; 3 bits straddle words: 10 codes, 2+1 bits, 10 codes, 1+2 bits, 10 codes."""
    words, filled = [0], 0
    for code in codes:
        low = min(bits, 32 - filled)
        words[-1] |= (code & ((1 << low) - 1)) << filled
        filled += low
        if filled == 32:
            words.append(0)
            filled = bits - low
            words[-1] |= code >> low
    if filled == 0:
        words.pop()
    return [w - (1 << 32) if w >= 1 << 31 else w for w in words]


def naive_files(codes, zeros, scales, bits, group, version):
    """codes [out, in], zeros and scales [out, groups]."""
    out, columns = codes.shape
    stored = zeros if version == "gptq_v2" else [[(z - 1) % (1 << bits) for z in row] for row in zeros.tolist()]
    stored = torch.as_tensor(stored)
    qweight = torch.tensor([naive_pack(row, bits) for row in codes.tolist()], dtype=torch.int32).t()
    qzeros = torch.tensor([naive_pack(stored[:, g].tolist(), bits) for g in range(zeros.shape[1])], dtype=torch.int32)
    g_idx = torch.tensor([i // group for i in range(columns)], dtype=torch.int32)
    return {"qweight": qweight.contiguous(), "qzeros": qzeros, "scales": scales.t().contiguous(), "g_idx": g_idx}


def directory(path, tensors, quantization, old=False):
    path.mkdir()
    config = CONFIG if old else CONFIG | {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    if old:
        (path / "quantize_config.json").write_text(json.dumps(quantization))
    safetensors.torch.save_file({f"{MODULE}.{k}": v for k, v in tensors.items()}, path / "model.safetensors")
    return path


def quantization(bits=4, group=8, version="gptq", **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": version} | more


def values(path) -> torch.Tensor:
    return Gptq().read(path).entries[NAME].load().dequantize()


def test_a_block_by_hand(tmp_path):
    """Eight 4-bit codes 0 … 7 in one word, lowest first; zero point 8 stored as 7; scale one half."""
    files = {"qweight": torch.tensor([[0x76543210]], dtype=torch.int32),
             "qzeros": torch.tensor([[7]], dtype=torch.int32), "scales": torch.tensor([[0.5]]).half()}
    path = directory(tmp_path / "m", files, quantization(group=8))
    entry = Gptq().read(path).entries[NAME]
    assert entry.codec == codecs.get("int4-g8") and entry.shape == (1, 8)
    assert entry.load().dequantize().tolist() == [[-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]]


def test_three_bits_by_hand(tmp_path):
    """Code 10 straddles words 0 and 1: its low two bits are the top of word 0, its high bit the bottom of word 1."""
    codes = [0] * 32
    codes[10], codes[21], codes[31] = 0b110, 0b011, 0b101
    assert naive_pack(codes, 3) == [(0b10 << 30) - (1 << 32), 1 | (1 << 31) - (1 << 32), 0b01 | (0b101 - 8 << 29)]
    files = {"qweight": torch.tensor([naive_pack(codes, 3)], dtype=torch.int32).t().contiguous(),
             "qzeros": torch.tensor([[3]], dtype=torch.int32), "scales": torch.tensor([[1.0]]).half()}
    path = directory(tmp_path / "m", files, quantization(3, -1))
    assert values(path).tolist() == [[c - 4.0 for c in codes]]


SHAPES = [(32, 64), (8, 96), (5, 40), (7, 33), (1, 1), (33, 7)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 8, 16, 30])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_every_layout_against_the_naive_one(tmp_path, bits, group, symmetric, version):
    for i, shape in enumerate(SHAPES):
        codes, zeros, scales = random_layer(bits, group, symmetric, shape, i)
        width = shape[1] if group == -1 else group
        theirs = naive_files(codes, zeros, scales, bits, width, version)
        codec = codecs.get(f"int{bits}-" + ("row" if group == -1 else f"g{group}") + ("" if symmetric else "-asym"))
        ours = to_file(qtensor(codec, codes, zeros, scales), version)
        assert ours.keys() == theirs.keys()
        for k in theirs:
            assert ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]), (k, shape)
        path = directory(tmp_path / str(i), theirs, quantization(bits, group, version))
        got = values(path)
        assert torch.equal(got, naive_values(codes, zeros, scales, width)), shape
        again = to_file(Gptq().read(path).entries[NAME].load(), version)
        assert all(torch.equal(again[k], theirs[k]) for k in theirs), shape


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns,group", [(64, 16), (40, 16), (33, 8)])
def test_act_order(tmp_path, bits, columns, group):
    """Columns lie in their own order in the file, and g_idx says the group of each: values stay where they were."""
    codes, zeros, scales = random_layer(bits, group, False, (6, columns))
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    tensor = qtensor(codecs.get(f"int{bits}-g{group}-asym"), codes, zeros, scales, order)
    files = to_file(tensor, "gptq_v2")
    meant = naive_values(codes, zeros, scales, group)[:, torch.argsort(order)]
    assert torch.equal(tensor.dequantize(), meant)
    naive = torch.tensor([naive_pack(row, bits) for row in codes[:, torch.argsort(order)].tolist()], dtype=torch.int32)
    assert torch.equal(files["qweight"], naive.t())
    assert files["g_idx"].tolist() == [g // group for g in torch.argsort(order).tolist()]
    path = directory(tmp_path / "m", files, quantization(bits, group, "gptq_v2", desc_act=True))
    assert torch.equal(values(path), meant)
    assert Gptq().read(path).entries[NAME].load().order is not None


def test_written_checked_and_read_back(tmp_path):
    tensors, kinds = {}, ["int4-g16", "int3-g32", "int8-row", "int2-g8", "int4-g16"]
    for i, kind in enumerate(kinds):
        codec = codecs.get(kind)
        tensors[f"model.layers.{i}.mlp.up_proj.weight"] = qtensor(codec, *random_layer(
            codec.bits, codec.group, True, (20, 50), i))
    data = torch.randn(3, 4).half()
    tensors["model.layers.0.mlp.gate.weight"] = QTensor(F16, (3, 4), {"data": data})
    tensors["model.embed_tokens.weight"] = QTensor(F16, (3, 4), {"data": data})
    tensors["model.layers.0.mlp.up_proj.bias"] = QTensor(F16, (4,), {"data": data[:1]})
    meant = checkpoint(tmp_path / "source", tensors)
    got = base.write(Gptq(), tmp_path / "out", meant)
    assert {n: e.codec.name for n, e in got.entries.items()} == {n: e.codec.name for n, e in meant.entries.items()}
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 16, True, False)
    assert config["checkpoint_format"] == "gptq" and config["quant_method"] == "gptq" and not config["lm_head"]
    assert list(config["dynamic"]) == [
        "-:^model\\.layers\\.0\\.mlp\\.gate$", "+:^model\\.layers\\.1\\.mlp\\.up_proj$",
        "+:^model\\.layers\\.2\\.mlp\\.up_proj$", "+:^model\\.layers\\.3\\.mlp\\.up_proj$"]
    assert not TransformersDirectory().detect(tmp_path / "out") and Gptq().detect(tmp_path / "out")


def test_the_order_of_columns_survives_and_is_announced(tmp_path):
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    tensor = qtensor(codecs.get("int4-g16"), *random_layer(4, 16, True, (8, 48)), order)
    got = base.write(Gptq(), tmp_path / "out", checkpoint(tmp_path / "source", {NAME: tensor}))
    assert torch.equal(got.entries[NAME].load().dequantize(), tensor.dequantize())
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["desc_act"] is True


def test_asymmetric_weights_are_written_in_version_2(tmp_path):
    codes, zeros, scales = random_layer(4, 16, False, (8, 32))
    zeros[0, 0] = 0
    source = checkpoint(tmp_path / "source", {NAME: qtensor(codecs.get("int4-g16-asym"), codes, zeros, scales)})
    base.write(Gptq(), tmp_path / "out", source)
    written = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert written["checkpoint_format"] == "gptq_v2" and written["sym"] is False
    with pytest.raises(FewbitsError, match=f"{NAME}.*zero points of 0, which version 1"):
        base.write(Gptq("gptq"), tmp_path / "out1", source)
    zeros[0, 0] = 1
    source = checkpoint(tmp_path / "source", {NAME: qtensor(codecs.get("int4-g16-asym"), codes, zeros, scales)})
    base.write(Gptq("gptq"), tmp_path / "out1", source)
    assert torch.equal(values(tmp_path / "out1"), naive_values(codes, zeros, scales, 16))


def test_middle_zero_points_read_as_symmetric_whatever_the_padding_holds(tmp_path):
    codes, zeros, scales = random_layer(4, 8, True, (5, 16))
    files = naive_files(codes, zeros, scales, 4, 8, "gptq_v2")
    files["qzeros"] |= 0x0FFFFFFF << 20 & 0x7FFFFFFF
    path = directory(tmp_path / "m", files, quantization(version="gptq_v2", sym=False))
    assert Gptq().read(path).entries[NAME].codec == codecs.get("int4-g8")


@pytest.mark.parametrize("kind,dtype", [("-sbf16", torch.bfloat16), ("-sf32", torch.float32)])
def test_scales_of_other_types(tmp_path, kind, dtype):
    codes, zeros, scales = random_layer(4, 8, True, (8, 16))
    files = naive_files(codes, zeros, scales.to(dtype), 4, 8, "gptq")
    path = directory(tmp_path / "m", files, quantization())
    entry = Gptq().read(path).entries[NAME]
    assert entry.codec == codecs.get(f"int4-g8{kind}")
    assert torch.equal(entry.load().dequantize(), naive_values(codes, zeros, scales.to(dtype), 8))
    got = base.write(Gptq(), tmp_path / "out", Gptq().read(path))
    assert got.entries[NAME].codec == entry.codec


def test_quantize_config_of_older_writers(tmp_path):
    codes, zeros, scales = random_layer(4, 8, True, (8, 16))
    files = naive_files(codes, zeros, scales, 4, 8, "gptq")
    path = directory(tmp_path / "m", files, {"bits": 4, "group_size": 8, "desc_act": False, "sym": True}, old=True)
    (path / "model.safetensors").rename(path / "gptq_model-4bit-8g.safetensors")
    assert Gptq().detect(path) and not TransformersDirectory().detect(path)
    assert torch.equal(values(path), naive_values(codes, zeros, scales, 8))


def test_dynamic_overrides(tmp_path):
    codes, zeros, scales = random_layer(8, 16, True, (8, 32))
    files = naive_files(codes, zeros, scales, 8, 16, "gptq")
    dynamic = {"-:.*down.*": {}, r"+:.*\.up_proj": {"bits": 8, "group_size": 16}, ".*": {"bits": 2}}
    path = directory(tmp_path / "m", files, quantization(4, 8, dynamic=dynamic))
    assert torch.equal(values(path), naive_values(codes, zeros, scales, 16))


def layer(**changes):
    codes, zeros, scales = random_layer(4, 8, True, (8, 16))
    files = naive_files(codes, zeros, scales, 4, 8, "gptq")
    for name, change in changes.items():
        if change is None:
            del files[name]
        else:
            files[name] = change(files[name])
    return files


def with_inf(scales):
    scales[1, 2] = float("inf")
    return scales


HOSTILE_AT_OPEN = {
    "no qzeros": (layer(qzeros=None), {}, "qweight: needs .*qzeros, which is missing"),
    "no scales": (layer(scales=None), {}, "qweight: needs .*scales, which is missing"),
    "no qweight": (layer(qweight=None) | {"y.qweight": layer()["qweight"]}, {}, "missing"),
    "bits": (layer(), {"bits": 5}, "bits: 5 bits"),
    "bits of another kind": (layer(), {"bits": "4"}, "bits: '4' bits"),
    "group": (layer(), {"group_size": 0}, "group_size: groups of 0"),
    "format": (layer(), {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    "pack_dtype": (layer(), {"pack_dtype": "int16"}, "pack_dtype 'int16'"),
    "dynamic": (layer(), {"dynamic": []}, None),
    "dynamic list": (layer(), {"dynamic": ["x"]}, "dynamic"),
    "pattern": (layer(), {"dynamic": {"(": {}}},  r"dynamic '\('"),
    "override": (layer(), {"dynamic": {".*": {"bits": 7}}}, "7 bits"),
    "bits do not fit": (layer(), {"bits": 8}, r"qweight: \[2, 8\], where \[4, 8\] was expected"),
    "group does not fit": (layer(), {"group_size": 4}, r"scales: \[2, 8\], where \[4, 8\] was expected"),
    "qzeros too short": (layer(qzeros=lambda t: t[:1]), {}, r"qzeros: \[1, 1\], where \[2, 1\] was expected"),
    "qweight of another type": (layer(qweight=lambda t: t.long()), {}, "qweight: I64"),
    "scales of another type": (layer(scales=lambda t: t.double()), {}, "scales: F64"),
    "g_idx too long": (layer(g_idx=lambda t: torch.cat([t, t])), {}, "qweight: .* was expected"),
}


@pytest.mark.parametrize("case", HOSTILE_AT_OPEN)
def test_hostile_directories_are_refused_when_opened(tmp_path, case):
    files, changes, message = HOSTILE_AT_OPEN[case]
    path = directory(tmp_path / "m", files, quantization() | changes)
    if message is None:
        assert Gptq().read(path).entries
        return
    with pytest.raises(FewbitsError, match=message) as error:
        Gptq().read(path)
    assert str(path) in str(error.value)


HOSTILE_AT_LOAD = {
    "group out of range": (layer(g_idx=lambda t: t + 1), "g_idx: groups 1 to 2, where there are 2"),
    "negative group": (layer(g_idx=lambda t: t - 1), "g_idx: groups -1 to 0"),
    "unequal groups": (layer(g_idx=lambda t: torch.tensor([0] * 9 + [1] * 7, dtype=torch.int32)),
                       "group 1 has 7 columns, where group_size is 8"),
    "infinite scale": (layer(scales=with_inf), r"scales: inf at \[1, 2\]"),
    "NaN scales": (layer(scales=lambda t: t * float("nan")), r"scales: nan at \[0, 0\]"),
}


@pytest.mark.parametrize("case", HOSTILE_AT_LOAD)
def test_hostile_tensors_are_refused_when_loaded(tmp_path, case):
    files, message = HOSTILE_AT_LOAD[case]
    path = directory(tmp_path / "m", files, quantization())
    with pytest.raises(FewbitsError, match=message) as error:
        values(path)
    assert str(path) in str(error.value)


def test_what_it_cannot_hold(tmp_path):
    q = qtensor(codecs.get("int4-g8"), *random_layer(4, 8, True, (8, 16)))
    table = codecs.get("nf4")

    def reason(name, tensor=q, codec=None, config=None):
        source = checkpoint(tmp_path, {name: tensor})
        source.config |= config or {}
        entry = source.entries[name]
        return Gptq().accepts(source, entry.as_(codec=codec) if codec else entry)

    assert reason(NAME) is None
    assert "embeddings" in reason("model.embed_tokens.weight")
    assert reason("lm_head.weight") is None
    assert "tied" in reason("lm_head.weight", config={"tie_word_embeddings": True})
    assert "int2, int3, int4 and int8" in reason(NAME, codec=table)
    assert "two-dimensional" in reason("experts.gate_up_proj")


def test_opening_needs_no_torch(tmp_path):
    directory(tmp_path / "m", layer(), quantization())
    code = ("import sys; from pathlib import Path; from fewbits.containers.gptq import Gptq;"
            f"c = Gptq().read(Path({str(tmp_path / 'm')!r}));"
            f"print(c.entries[{NAME!r}].codec.name, 'torch' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "int4-g8 False"
