"""The same codes through every int layout and back: files come out bit for bit, planes too."""

from __future__ import annotations

from itertools import permutations

import pytest
import safetensors.torch
import torch

from fewbits import containers
from fewbits.containers import base
from fewbits.errors import FewbitsError
from tests.containers.intk import NAME, checkpoint, random_tensor

LAYOUTS = ("gptq-v1", "gptq-v2", "awq", "compressed-tensors")


def written(path, layout, source):
    base.write(containers.by_name(layout), path, source)
    return safetensors.torch.load_file(path / "model.safetensors")


@pytest.mark.parametrize("kind", ["int4-g32", "int4-g16-asym", "int4-row-asym", "int4-row"])
@pytest.mark.parametrize("a,b", list(permutations(LAYOUTS, 2)))
def test_there_and_back(tmp_path, kind, a, b):
    """Zero points of 0 are left out: version 1 of GPTQ has none."""
    tensor = random_tensor(kind, (24, 96), zero=False)
    first = written(tmp_path / "a", a, checkpoint(tmp_path / "source", {NAME: tensor}))
    written(tmp_path / "b", b, containers.open(tmp_path / "a"))
    between = containers.open(tmp_path / "b").entries[NAME].load()
    assert between.codec == tensor.codec and between.order is None
    assert all(torch.equal(between.planes[k], tensor.planes[k]) for k in tensor.planes)
    again = written(tmp_path / "c", a, containers.open(tmp_path / "b"))
    assert again.keys() == first.keys() and all(torch.equal(again[k], first[k]) for k in first)


@pytest.mark.parametrize("kind", ["int2-g32", "int3-g16-asym", "int8-row-asym", "int8-g32", "int3-g32-sbf16"])
@pytest.mark.parametrize("a,b", list(permutations(("gptq-v1", "gptq-v2", "compressed-tensors"), 2)))
def test_other_widths_there_and_back(tmp_path, kind, a, b):
    tensor = random_tensor(kind, (5, 96), zero=False)
    tensor = type(tensor)(tensor.codec, tensor.shape, tensor.planes | {
        "scales": tensor.planes["scales"].to(tensor.codec.dtype)})
    first = written(tmp_path / "a", a, checkpoint(tmp_path / "source", {NAME: tensor}))
    written(tmp_path / "b", b, containers.open(tmp_path / "a"))
    again = written(tmp_path / "c", a, containers.open(tmp_path / "b"))
    assert again.keys() == first.keys() and all(torch.equal(again[k], first[k]) for k in first)


@pytest.mark.parametrize("source", ["awq", "compressed-tensors", "gptq-v2"])
def test_a_zero_point_of_zero(tmp_path, source):
    """Version 1 of GPTQ cannot say it; the others can."""
    tensor = random_tensor("int4-g16-asym", (24, 96), zero=True)
    assert bool((tensor.unpack()[1]["zero"] == 0).any())
    written(tmp_path / "a", source, checkpoint(tmp_path / "source", {NAME: tensor}))
    found = containers.open(tmp_path / "a")
    for layout in LAYOUTS[1:]:
        written(tmp_path / layout, layout, found)
        got = containers.open(tmp_path / layout).entries[NAME].load()
        assert torch.equal(got.dequantize(), tensor.dequantize())
    with pytest.raises(FewbitsError, match="zero points of 0, which version 1"):
        written(tmp_path / "v1", "gptq-v1", found)


def test_act_order_stays_in_gptq(tmp_path):
    tensor = random_tensor("int4-g16", (24, 96))
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    ordered = type(tensor)(tensor.codec, tensor.shape, tensor.planes, order)
    first = written(tmp_path / "v1", "gptq-v1", checkpoint(tmp_path / "source", {NAME: ordered}))
    written(tmp_path / "v2", "gptq-v2", containers.open(tmp_path / "v1"))
    again = written(tmp_path / "again", "gptq-v1", containers.open(tmp_path / "v2"))
    assert all(torch.equal(again[k], first[k]) for k in first)
    for layout in ("awq", "compressed-tensors"):
        with pytest.raises(FewbitsError, match="act-order"):
            written(tmp_path / layout, layout, containers.open(tmp_path / "v1"))
        assert not (tmp_path / layout).exists()
