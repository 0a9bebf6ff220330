"""The layouts that `explain` draws, against what the codecs pack and decode."""

from __future__ import annotations

import pytest
import torch

from fewbits import codecs
from fewbits.codecs import decode_only, ggml, iq4, kquants, mxfp4, table, ternary
from fewbits.codecs.base import decode_units
from fewbits.layouts import BLOCKS, PLANES, layout

GGML = (*ggml.TYPES, *kquants.TYPES, *iq4.TYPES, *mxfp4.TYPES, *ternary.TYPES)
OTHERS = ("int4-g128", "int3-g32-asym", "int8-row", "int4-g128-sbf16", "int8", "nf4", "fp4", "nf4-b128", "nf4-dq",
          "fp8-e4m3", "fp8-e5m2", "fp8-e4m3-b128", "kmeans4", "kmeans3", "w8a8", "w8a8-static-asym",
          "f16", "f32")


def changed(codec, shape, before: dict, after: dict) -> set[str]:
    """Which of codes and parameters two sets of planes differ in."""
    (codes, params), (other_codes, other_params) = codec.unpack(before, shape), codec.unpack(after, shape)
    out = {k for k in params if not torch.equal(params[k].float().nan_to_num(7), other_params[k].float().nan_to_num(7))}
    return out | ({"codes"} if not torch.equal(codes, other_codes) else set())


def test_every_format_has_a_layout():
    assert set(GGML) == BLOCKS.keys()
    assert {codecs.get(n).family for n in OTHERS} == PLANES.keys()
    assert all(layout(codecs.get(n)) is None for n in decode_only.TYPES)


@pytest.mark.parametrize("name", GGML)
def test_each_field_of_a_block_holds_what_it_says(name):
    codec, found = codecs.get(name), layout(codecs.get(name))
    assert found.adjoining and found.nbytes == codec.nbytes(found.shape) == codec.block_bytes
    assert found.shape == (1, codec.columns)
    generator = torch.Generator().manual_seed(0)
    at = 0
    for field in found.fields:
        seen = set()
        for _ in range(8):
            blocks = torch.randint(0, 256, (1, codec.block_bytes), dtype=torch.uint8, generator=generator)
            after = blocks.clone()
            after[0, at:at + field.nbytes] = torch.randint(0, 256, (field.nbytes,), dtype=torch.uint8,
                                                           generator=generator)
            seen |= changed(codec, found.shape, {"blocks": blocks}, {"blocks": after})
        assert seen == set(field.sets), field.name
        at += field.nbytes


@pytest.mark.parametrize("name", OTHERS)
def test_each_plane_holds_what_it_says(name):
    codec, found = codecs.get(name), layout(codecs.get(name))
    generator = torch.Generator().manual_seed(0)
    for field in found.fields:
        seen = set()
        for _ in range(4):
            planes = {n: random(dtype, size, generator) for n, (dtype, size) in codec.planes(found.shape).items()}
            assert field.nbytes == planes[field.name].numel() * planes[field.name].element_size()
            dtype, size = codec.planes(found.shape)[field.name]
            seen |= changed(codec, found.shape, planes, planes | {field.name: random(dtype, size, generator)})
        assert seen == set(field.sets), field.name
    assert found.nbytes == codec.nbytes(found.shape)


def random(dtype: str, size: tuple, generator: torch.Generator) -> torch.Tensor:
    if "int" in dtype:
        kind = getattr(torch, dtype)
        return torch.randint(torch.iinfo(kind).min, torch.iinfo(kind).max + 1, size, generator=generator).to(kind)
    return torch.randn(size, generator=generator).to(getattr(torch, dtype))


@pytest.mark.parametrize("name", [*GGML, *OTHERS])
def test_formulas_decode(name):
    codec, found = codecs.get(name), layout(codecs.get(name))
    generator = torch.Generator().manual_seed(1)
    planes = {n: random(dtype, size, generator) for n, (dtype, size) in codec.planes(found.shape).items()}
    if codec.family == "ggml":  # scales that are neither huge nor NaN
        at = 0
        for field in found.fields:
            if field.text.endswith("float16"):
                planes["blocks"][0, at:at + 2] = torch.tensor([0.03], dtype=torch.float16).view(torch.uint8)
            if field.name == "e":
                planes["blocks"][0, at] = 120
            at += field.nbytes
    codes, params = codec.unpack(planes, found.shape)
    if name.startswith("fp8"):
        codes = (codes % 0x70).to(torch.uint8)  # no NaN
    meant = decode_units(codes, codec, params)
    units = meant.shape[1] // next(iter(params.values())).shape[1] if params else 1
    values = {k: spread(p, units, meant.shape) for k, p in params.items()}
    got = eval(found.formula, {"code": codes.double(), **values, **tables(codec, codes, params)})  # noqa: S307
    got = got(codes) if callable(got) else got
    assert torch.allclose(got.double(), meant.double(), rtol=1e-5, atol=1e-6)


def spread(p: torch.Tensor, unit: int, shape: tuple) -> torch.Tensor:
    """Parameters `[rows, units, k]` for every column."""
    if p.shape[-1] == 0 or p.shape[-1] * p.shape[1] > shape[1]:
        return p
    return p.double().repeat_interleave(unit // p.shape[-1], -1).flatten(1).expand(shape)


class Levels:
    """`levels[code]` for a table, or for one of the row."""

    def __init__(self, values: torch.Tensor):
        self.values = values.double()

    def __getitem__(self, code: torch.Tensor) -> torch.Tensor:
        return self.values[code.long()]


def tables(codec, codes: torch.Tensor, params: dict) -> dict:
    if codec.family == "codebook":
        return {"levels": Levels(params["levels"].flatten())}
    if codec.family == "table":
        return {"levels": Levels(table.table(codec.kind).table), "map8": Levels(table.dynamic_map().table)}
    if codec.family.startswith("fp8"):
        return {"float8": lambda code: codes.view(codec.kind.dtype).double()}
    module = {"IQ4_NL": iq4, "IQ4_XS": iq4, "MXFP4": mxfp4}.get(codec.name)
    return {"levels": Levels(module.table().table)} if module else {}
