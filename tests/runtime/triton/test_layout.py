"""The layout of the GPU: codes come back, one block by hand, and what does not fit says why."""

from __future__ import annotations

import pytest
import torch

from fewbits import codecs
from fewbits.codecs.mxfp4 import E2M1
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.runtime.triton import layout
from fewbits.runtime.triton.layout import Layout
from fewbits.solvers import solve

NAMES = ["int4-g128", "int4-g32-asym", "int2-g64", "int2-g16-asym", "int3-g128", "int3-g32-asym", "int8-g128",
         "int8-row-asym", "int4-g96", "int4-g128-sbf16", "int8", "nf4", "nf4-dq", "fp4", "fp8-e4m3", "fp8-e5m2",
         "fp8-e4m3-b128", "kmeans4", "kmeans3", "kmeans2", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K",
         "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0", "Q1_0"]


def weight(name: str, *shape: int) -> QTensor:
    torch.manual_seed(len(name) + sum(shape))
    return solve(torch.randn(shape) * 0.05, codecs.get(name))


def decoded(found: Layout, planes: dict[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Values by the layout's formula, in float64."""
    codes = layout.unpack(found, planes, shape).long().view(shape)

    def spread(plane: torch.Tensor) -> torch.Tensor:
        return plane[..., :shape[-2]].mT.double().repeat_interleave(found.group, -1)[..., :shape[-1]]

    if found.levels == "line":
        zero = spread(planes["second"]) if found.second == "zeros" else found.zero
        levels = codes - zero
    elif found.levels == "table":
        levels = planes["levels"].double()[codes]
    elif found.levels == "rows":
        levels = planes["levels"].double().gather(-1, codes)
    elif found.levels == "e2m1":
        levels = torch.tensor(E2M1, dtype=torch.float64)[codes] / 2
    else:
        kind = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[found.levels]
        levels = codes.to(torch.uint8).view(kind).double()
    values = spread(planes["scales"]) * levels
    if found.second == "offsets":
        values = values + spread(planes["second"])
    return values * planes["row"].double().unsqueeze(-1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(37, 768), (3, 20, 256)], ids=str)
def test_values_and_codes(name: str, shape: tuple[int, ...]) -> None:
    if name in ("nf4-dq", "fp8-e4m3-b128") and len(shape) == 3:
        shape = shape[1:]
    q = weight(name, *shape)
    assert layout.unfit(q) is None
    found, planes, kept = layout.pack(q)
    codes = layout.unpack(found, planes, q.shape)
    assert torch.equal(codes, q.unpack()[0])
    again = q.codec.pack(codes, kept, q.shape)
    assert all(torch.equal(again[plane], q.planes[plane]) for plane in q.planes)
    want = q.dequantize().double()
    error = (decoded(found, planes, q.shape) - want).abs().max() / want.abs().max()
    assert error < (1e-6 if name.startswith(("int", "kmeans", "fp8-e5m2", "fp8-e4m3")) and name[-3:] != "128" else 1e-3)


@pytest.mark.parametrize("name", ["int8-g128", "fp8-e4m3-b128", "int4-g128", "int3-g96-asym", "int2-g64"])
def test_a_last_group_that_is_cut(name: str) -> None:
    q = weight(name, 20, 1216)
    want = q.dequantize().double()
    found, planes, _ = layout.pack(q)
    assert (decoded(found, planes, q.shape) - want).abs().max() < 1e-3 * want.abs().max()


def test_one_block_by_hand() -> None:
    """4 bits: 16 words an output, field i of word j is column 16 i + j."""
    codes = (torch.arange(128) * 7 % 16).to(torch.uint8).expand(1, 128)
    codec = codecs.get("int4-g128")
    q = QTensor.pack(codec, (1, 128), codes, {"scale": torch.full((1, 1, 1), 0.5, dtype=torch.float16),
                                              "zero": torch.full((1, 1, 1), 8, dtype=torch.uint8)})
    found, planes, _ = layout.pack(q)
    assert found == Layout(4, 128, zero=8.0)
    word = sum(int(codes[0, 16 * i + 3]) << 4 * i for i in range(8))
    assert int(planes["words"][3, 0]) & 0xFFFFFFFF == word
    assert planes["words"].shape == (16, 16) and not planes["words"][:, 1:].any()
    assert float(planes["scales"][0, 0] * planes["row"][0]) == 0.5


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 3e4, 1e30])
def test_scales_beyond_float16(scale: float) -> None:
    q = weight("nf4", 8, 128)
    q = QTensor(q.codec, q.shape, q.planes | {"absmax": q.planes["absmax"] * scale})
    found, planes, _ = layout.pack(q)
    want = q.dequantize().double()
    assert (decoded(found, planes, q.shape) - want).abs().max() < 1e-3 * want.abs().max()


@pytest.mark.parametrize("name, shape, reason", [
    ("f16", (4, 64), "no layout of F16 for the GPU"),
    ("int4-g8", (4, 64), "groups of 8 columns are no multiples of 16"),
    ("int4-g128", (64,), "[64] is no matrix, nor a stack of matrices"),
    ("nf4", (4, 100), "blocks of nf4 cross rows of 100 columns")])
def test_reasons(name: str, shape: tuple[int, ...], reason: str) -> None:
    assert layout.unfit(QTensor(codecs.get(name), shape, {})) == reason


@pytest.mark.parametrize("name, code", [("fp8-e4m3", 0xFF), ("fp8-e5m2", 0x7C), ("fp8-e5m2", 0xFE)])
def test_codes_that_are_no_numbers(name: str, code: int) -> None:
    q = weight(name, 8, 64)
    q.planes["codes"][3, 5] = code
    with pytest.raises(FewbitsError, match="no finite numbers"):
        layout.pack(q)
