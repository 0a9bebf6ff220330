"""The layout of our own: every codec there and back, short names, hostile files."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from fewbits import codecs
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.decode_only import DecodeOnly
from fewbits.codecs.floats import BF16, F32
from fewbits.containers import base
from fewbits.containers import open as open_model
from fewbits.containers.fewbits import Fewbits, short
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.recipe import CONTAINERS

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float16"}
NAME = "model.layers.0.mlp.up_proj.weight"
NAMES = ("kmeans4", "kmeans3", "kmeans2", "fp8-e4m3", "fp8-e5m2", "fp8-e4m3-b128", "fp8-e4m3-b32", "int2",
         "int3-g32-asym", "int4-row", "int4-g48-asym-sf32", "int4-g16-sbf16", "int8", "w8a8",
         "w8a8-static-asym", "nf4", "nf4-dq", "fp4-b32", "fp4-dq", "Q2_K", "Q3_K", "Q4_0", "Q5_1", "Q8_0",
         "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "IQ2_XXS", "IQ3_S")


def random(shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensor(name: str, shape, order=None) -> QTensor:
    """Any planes: random bytes, and finite numbers."""
    codec, planes = codecs.get(name), {}
    for i, (part, (dtype, size)) in enumerate(codec.planes(shape).items()):
        data = random(size, i)
        planes[part] = (data * 40).to(torch.int16).to(getattr(torch, dtype)) if dtype.endswith("int8") \
            else data.to(getattr(torch, dtype))
    return QTensor(codec, shape, planes, order)


def checkpoint(path, tensors: dict[str, QTensor]) -> Checkpoint:
    entries = {name: Entry(name, t.shape, t.codec, lambda t=t: t) for name, t in tensors.items()}
    return Checkpoint(path, "test", CONFIG, entries)


def same(a: QTensor, b: QTensor) -> bool:
    assert a.codec == b.codec and a.shape == b.shape and a.planes.keys() == b.planes.keys()
    orders = a.order is b.order is None or torch.equal(a.order, b.order)
    return orders and all(torch.equal(a.planes[k], b.planes[k]) for k in a.planes)


@pytest.mark.parametrize("name", NAMES)
def test_every_codec_there_and_back(tmp_path, name):
    """A matrix, a stack of matrices and, where the codec takes it, a ragged width; beside floats."""
    ragged = (5, 33) if codecs.get(name).family != "ggml" else (5, 256)
    tensors = {NAME: tensor(name, (6, 512)), "model.layers.1.mlp.up_proj.weight": tensor(name, ragged),
               "model.layers.0.mlp.experts.up_proj.weight": tensor(name, (3, 128, 256)),
               "model.embed_tokens.weight": tensor(name, (7, 256)),
               "model.norm.weight": QTensor(BF16, (8,), {"data": random((1, 8)).bfloat16()})}
    got = base.write(Fewbits(), tmp_path / "out", checkpoint(tmp_path / "s", tensors))
    assert got.entries.keys() == tensors.keys()
    assert all(same(got.entries[n].load(), t) for n, t in tensors.items())
    assert open_model(tmp_path / "out").container == "fewbits"
    assert got.nbytes == sum(t.nbytes for t in tensors.values())


def test_every_family_is_in_the_list():
    assert {codecs.get(n).family for n in NAMES} == set(CONTAINERS) - {"float"}
    assert any(isinstance(codecs.get(n), DecodeOnly) for n in NAMES)


def test_what_the_files_hold(tmp_path):
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": tensor("kmeans4", (4, 32), None) for i in range(11)}
    tensors["model.layers.7.mlp.up_proj.weight"] = tensor("fp8-e4m3", (4, 32))
    tensors["model.layers.9.mlp.up_proj.weight"] = QTensor(F32, (4, 32), {"data": random((4, 32))})
    tensors["lm_head.weight"] = tensor("nf4", (2, 64))
    base.write(Fewbits(), tmp_path / "out", checkpoint(tmp_path / "s", tensors))
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"] == {
        "quant_method": "fewbits", "version": 1, "tensors": {
            "model.layers.*.mlp.up_proj.weight": {"codec": "kmeans4", "shape": [4, 32]},
            "model.layers.7.mlp.up_proj.weight": {"codec": "fp8-e4m3", "shape": [4, 32]},
            "lm_head.weight": {"codec": "nf4", "shape": [2, 64]}}}
    found = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    some = {k: (v.dtype, tuple(v.shape)) for k, v in found.items() if ".1." in k or ".9." in k or "head" in k}
    assert some == {"model.layers.1.mlp.up_proj.weight.codes": (torch.uint8, (4, 16)),
                    "model.layers.1.mlp.up_proj.weight.levels": (torch.float16, (4, 16)),
                    "model.layers.9.mlp.up_proj.weight": (torch.float32, (4, 32)),
                    "lm_head.weight.codes": (torch.uint8, (2, 32)), "lm_head.weight.absmax": (torch.float32, (2, 1))}


def test_names_are_shortened_only_where_it_saves():
    a, b = (codecs.get("int4"), (4, 8)), (codecs.get("int3"), (4, 8))
    assert short({"x.0.w": a}) == {"x.0.w": a}
    assert short({"x.0.w": a, "x.1.w": b}) == {"x.0.w": a, "x.1.w": b}
    assert short({"x.0.y.0.w": a, "x.1.y.1.w": a, "x.1.y.2.w": b}) == {"x.*.y.*.w": a, "x.1.y.2.w": b}


@pytest.mark.parametrize("shape", [(4, 32), (3, 4, 32)])
def test_column_orders(tmp_path, shape):
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(32, generator=generator) for _ in range(shape[0])])
    meant = tensor("int4-g16", shape, order if len(shape) == 3 else order[0])
    plain = tensor("int4-g16", shape)
    got = base.write(Fewbits(), tmp_path / "out", checkpoint(tmp_path / "s", {
        NAME: meant, "model.layers.1.mlp.up_proj.weight": plain}))
    assert same(got.entries[NAME].load(), meant)
    assert torch.equal(got.entries[NAME].load().dequantize(), meant.dequantize())
    assert got.entries["model.layers.1.mlp.up_proj.weight"].load().order is None


def test_a_shape_that_the_codec_cannot_have(tmp_path):
    with pytest.raises(FewbitsError, match=r"cannot hold .*up_proj.weight \(Q4_K\): 100 columns"):
        base.write(Fewbits(), tmp_path / "out", checkpoint(tmp_path / "s", {
            NAME: QTensor(codecs.get("Q4_K"), (2, 100), {"blocks": torch.zeros(2, 56, dtype=torch.uint8)})}))


def directory(path, files, **changes):
    quantization = {"quant_method": "fewbits", "version": 1,
                    "tensors": {NAME: {"codec": "kmeans2", "shape": [2, 8]}}} | changes
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    safetensors.torch.save_file(files, path / "model.safetensors", {"format": "pt"})
    return path


GOOD = {f"{NAME}.codes": torch.zeros(2, 2, dtype=torch.uint8), f"{NAME}.levels": torch.ones(2, 4).half()}


def codec(name, shape=(2, 8)):
    return {"tensors": {NAME: {"codec": name, "shape": shape if not isinstance(shape, tuple) else list(shape)}}}


def put(part, value):
    return GOOD | {f"{NAME}.{part}": value}


HOSTILE = {
    "no levels": ({f"{NAME}.codes": GOOD[f"{NAME}.codes"]}, {}, "codes: needs .*levels, which is missing"),
    "no codes": ({f"{NAME}.levels": GOOD[f"{NAME}.levels"]}, {}, "levels: needs .*codes, which is missing"),
    "order alone": ({f"{NAME}.order": torch.arange(8).int()}, {}, "order: needs .*codes, which is missing"),
    "nothing": ({"x": torch.ones(2)}, {}, f"{NAME}: no file holds"),
    "both": (GOOD | {NAME: torch.ones(2, 8)}, {}, "stands beside"),
    "codes too long": (put("codes", torch.zeros(2, 3).byte()), {}, r"codes: U8 \[2, 3\], where U8 \[2, 2\]"),
    "codes of another type": (put("codes", torch.zeros(2, 2, dtype=torch.int8)), {}, r"I8 \[2, 2\], where U8 \[2, 2\]"),
    "levels of another type": (put("levels", torch.ones(2, 4)), {}, r"F32 \[2, 4\], where F16 \[2, 4\]"),
    "levels of another shape": (put("levels", torch.ones(2, 3).half()), {}, r"F16 \[2, 3\], where F16 \[2, 4\]"),
    "order of another shape": (put("order", torch.arange(7).int()), {}, r"order: I32 \[7\], where I32 \[8\]"),
    "order of another type": (put("order", torch.arange(8)), {}, r"order: I64 \[8\]"),
    "not named": (GOOD, {"tensors": {}}, "does not name"),
    "no version": (GOOD, {"version": None}, "version None, where 1 is read"),
    "a later version": (GOOD, {"version": 2}, "version 2, where 1 is read"),
    "true for a version": (GOOD, {"version": True}, "version True"),
    "no tensors": (GOOD, {"tensors": None}, "tensors None, where an object"),
    "a list of tensors": (GOOD, {"tensors": [NAME]}, "where an object"),
    "no codec": (GOOD, {"tensors": {NAME: {"shape": [2, 8]}}}, "where a codec and a shape"),
    "an unknown codec": (GOOD, codec("kmeans9"), "unknown codec 'kmeans9'"),
    "an impossible codec": (GOOD, codec("int4-g0"), "a group of 0 columns"),
    "a float": (GOOD, codec("f16"), "F16 at shape .* held as it is"),
    "a width the codec cannot have": (GOOD, codec("Q4_K"), r"Q4_K at shape \[2, 8\]"),
    "no shape": (GOOD, codec("kmeans2", None), "shape None"),
    "an empty shape": (GOOD, codec("kmeans2", []), r"shape \[\]"),
    "a negative shape": (GOOD, codec("kmeans2", [2, -8]), r"shape \[2, -8\]"),
    "true in the shape": (GOOD, codec("kmeans2", [True, 8]), r"shape \[True, 8\]"),
    "text in the shape": (GOOD, codec("kmeans2", ["2", 8]), "shape"),
    "another shape": (GOOD, codec("kmeans2", [2, 40]), r"codes: U8 \[2, 2\], where U8 \[2, 10\]"),
    "a huge shape": (GOOD, codec("kmeans2", [1 << 40, 1 << 40]), "codes: U8"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_at_opening(tmp_path, case):
    files, changes, message = HOSTILE[case]
    path = directory(tmp_path / "m", files, **changes)
    with pytest.raises(FewbitsError, match=message):
        open_model(path)


def test_the_same_sound(tmp_path):
    got = open_model(directory(tmp_path / "m", GOOD)).entries[NAME].load()
    assert torch.equal(got.dequantize(), torch.ones(2, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_levels_that_are_no_numbers(tmp_path, value):
    levels = torch.ones(2, 4).half()
    levels[1, 2] = value
    entry = open_model(directory(tmp_path / "m", put("levels", levels))).entries[NAME]
    with pytest.raises(FewbitsError, match=r"levels: -?(nan|inf) at \[1, 2\]"):
        entry.load()


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6, 6], [1, 2, 3, 4, 5, 6, 7, 8], [-1, 0, 1, 2, 3, 4, 5, 6]])
def test_orders_that_are_none(tmp_path, order):
    entry = open_model(directory(tmp_path / "m", put("order", torch.tensor(order, dtype=torch.int32)))).entries[NAME]
    with pytest.raises(FewbitsError, match="order: is no order of the columns"):
        entry.load()
