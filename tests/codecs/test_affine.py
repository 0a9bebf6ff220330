"""int-k and rowwise int8: by hand, every byte string there and back, ragged groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits import codecs
from fewbits.codecs.affine import INT8, IntK
from fewbits.qtensor import QTensor


def test_int4_by_hand():
    """Two groups of two columns and a ragged one: 0.5 * (code - 8) and so on."""
    codec = IntK(4, 2)
    planes = {"codes": torch.tensor([[0x9F, 0x08, 0x0C]], dtype=torch.uint8),
              "scales": torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float16)}
    assert codec.planes((1, 5)) == {"codes": ("uint8", (1, 3)), "scales": ("float16", (1, 3))}
    assert QTensor(codec, (1, 5), planes).dequantize().tolist() == [[3.5, 0.5, 0.0, 8.0, 8.0]]


def test_int3_asymmetric_by_hand():
    """Codes 7, 0, 5 with zero point 6 and scale 0.25; 7 | 0 << 3 | 5 << 6 = 0x147."""
    codec = codecs.get("int3-g4-asym")
    planes = {"codes": torch.tensor([[0x47, 0x01]], dtype=torch.uint8), "zeros": torch.tensor([[6]], dtype=torch.uint8),
              "scales": torch.tensor([[0.25]], dtype=torch.float16)}
    assert QTensor(codec, (1, 3), planes).dequantize().tolist() == [[0.25, -1.5, -0.25]]


def test_int8_by_hand():
    """The order of operations is bitsandbytes': code * absmax, then times 1/127."""
    planes = {"codes": torch.tensor([[127, -127, 1, 0]], dtype=torch.int8), "absmax": torch.tensor([[3.0]])}
    got = QTensor(INT8, (1, 4), planes).dequantize()
    assert torch.equal(got, planes["codes"] * planes["absmax"] * 7.874015718698502e-3)
    assert torch.allclose(got, torch.tensor([[3.0, -3.0, 3 / 127, 0.0]]))


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 40), st.integers(1, 60), st.booleans(),
       st.sampled_from(["F16", "BF16", "F32"]))
def test_shapes_of_any_width(bits, group, columns, symmetric, kind):
    codec = IntK(bits, group, symmetric, kind)
    w = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))
    units = -(-columns // codec.unit(columns))
    codes = torch.randint(0, 1 << bits, (3, columns), dtype=torch.uint8)
    zero = torch.full((3, units, 1), codec.middle, dtype=torch.uint8) if symmetric else codes[:, :units, None]
    params = {"scale": torch.randn(3, units, 1).to(codec.dtype), "zero": zero}
    packed = QTensor.pack(codec, tuple(w.shape), codes, params)
    announced = {k: shape for k, (_, shape) in codec.planes((3, columns)).items()}
    assert {k: tuple(p.shape) for k, p in packed.planes.items()} == announced
    back, same = packed.unpack()
    assert torch.equal(back, codes)
    assert all(torch.equal(same[k], params[k]) for k in params)
    scale, groups = params["scale"].float(), codes.float().split(codec.unit(columns), 1)
    naive = torch.cat([scale[:, i] * (groups[i] - zero[:, i].float()) for i in range(units)], 1)
    assert torch.equal(packed.dequantize(), naive)


@given(st.sampled_from(["int2-g8", "int3-g8-asym", "int4-g8-asym", "int8-g8-asym"]), st.integers(0, 2 ** 32 - 1))
def test_any_bytes(name, seed):
    codec = codecs.get(name)
    generator = torch.Generator().manual_seed(seed)
    planes = {}
    for k, (dtype, shape) in codec.planes((2, 64)).items():
        size = 2 if dtype == "float16" else 1
        raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, generator=generator)
        planes[k] = raw.view(getattr(torch, dtype))
    back = codec.pack(*codec.unpack(planes, (2, 64)), (2, 64))
    assert all(torch.equal(back[k].view(torch.uint8), planes[k].view(torch.uint8)) for k in planes)


@given(st.integers(0, 2 ** 32 - 1))
def test_any_int8_bytes(seed):
    codes = torch.randint(-128, 128, (2, 7), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    planes = {"codes": codes, "absmax": torch.tensor([[1.0], [2.0]])}
    back = INT8.pack(*INT8.unpack(planes, (2, 7)), (2, 7))
    assert all(torch.equal(back[k], planes[k]) for k in planes)


@pytest.mark.parametrize(("name", "full"), [("int4", "int4-g128"), ("int3", "int3-g64"), ("int2-asym", "int2-g64-asym"),
                                            ("int4-row", "int4-row"), ("INT4-G32-sBF16", "int4-g32-sbf16"),
                                            ("int8-row", "int8-row"), ("int8", "int8")])
def test_names(name, full):
    assert codecs.get(name).name == full


def test_symmetric_values_on_the_grid_are_found():
    q = torch.randint(-8, 8, (4, 128), generator=torch.Generator().manual_seed(1)).float()
    q[:, 0] = -8
    codec = codecs.get("int4-g128")
    params = codec.fit(q * 0.125, None)
    assert torch.equal(codec.grid(params, 128).decode(codec.grid(params, 128).encode(q * 0.125)), q * 0.125)
