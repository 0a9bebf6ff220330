"""The same values in another codec: checked by what both decode to, and by gguf-py's own decoding of the blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType

from fewbits import codecs
from fewbits.qtensor import QTensor
from fewbits.recoding import candidates, holds
from fewbits.recoding import recode as recode_held
from fewbits.solvers import solve


def recode(q: QTensor, codec: codecs.Codec) -> QTensor | None:
    return recode_held(q, codec) if holds(q, codec) else None


def made(name: str, columns: int = 256) -> QTensor:
    generator = torch.Generator().manual_seed(len(name))
    return solve(torch.randn(6, columns, generator=generator), codecs.get(name), "nearest")


@pytest.mark.parametrize("before, after", [
    ("int4-g32", "Q4_0"), ("int4-g128", "Q4_0"), ("int4-row", "Q4_0"), ("int3-g64", "Q4_0"), ("int2-g32", "Q4_0"),
    ("int8-g32", "Q8_0"), ("int4-g64", "Q8_0"), ("Q4_0", "int4-g32"), ("Q5_0", "int8-g32"), ("Q8_0", "int8-g32"),
    ("int3-g32-asym", "int4-g32-asym"), ("int4-row", "int8-row"), ("int4-g32-sbf16", "int4-g32-sf32"),
    ("int2-g16", "int8-g16"),
])
def test_same_values(before: str, after: str) -> None:
    old = made(before)
    new = recode(old, codecs.get(after))
    assert new is not None and new.codec.name == after
    assert torch.equal(new.dequantize(), old.dequantize())
    if new.codec.family == "ggml":
        theirs = quants.dequantize(new.planes["blocks"].numpy(), GGMLQuantizationType[after])
        assert np.array_equal(theirs, old.dequantize().numpy())


def test_every_candidate_is_tried_and_keeps_values_or_says_no() -> None:
    for name in ("int4-g32", "int4-g128-asym", "int3-g100", "int8-g128-asym", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        old = made(name, 320)
        for codec in candidates(old.codec, 320):
            new = recode(old, codec)
            assert new is None or torch.equal(new.dequantize(), old.dequantize())


def test_minimum_that_float16_cannot_hold_is_refused() -> None:
    old = made("int4-g32-asym")
    scale = torch.full_like(old.planes["scales"], 1 + 2 ** -10)  # times 13 needs more than 11 bits
    codes, params = old.unpack()
    params = {"scale": scale.unsqueeze(-1), "zero": torch.full_like(params["zero"], 13)}
    q = QTensor.pack(old.codec, old.shape, codes, params)
    assert recode(q, codecs.get("Q4_1")) is None
    params["zero"].fill_(8)
    assert recode(QTensor.pack(old.codec, old.shape, codes, params), codecs.get("Q4_1")) is not None


def test_minimums_and_scales_may_be_rounded_where_that_is_allowed() -> None:
    old = made("int4-g128-asym")
    assert holds(old, codecs.get("Q4_1"), nearly=True)
    change = recode_held(old, codecs.get("Q4_1")).dequantize() - old.dequantize()
    assert 0 < float(change.norm() / old.dequantize().norm()) < 1e-3
    assert not holds(made("Q4_1"), codecs.get("int4-g32-asym"), nearly=True), "zero points are whole numbers"
    old.planes["scales"].fill_(65504)
    assert not holds(old, codecs.get("Q4_1"), nearly=True), "65504 times a zero point has no place in float16"


def test_blocks_without_a_scale() -> None:
    old = made("Q4_1")
    for least, meant in ((0.0, True), (1.0, False)):
        blocks = old.planes["blocks"].clone().unflatten(-1, (-1, 20))
        blocks[..., :4] = torch.tensor([0, least]).half().view(torch.uint8)
        q = QTensor(old.codec, old.shape, {"blocks": blocks.flatten(-2)})
        assert holds(q, codecs.get("int4-g32-asym")) == meant
    zeros = solve(torch.zeros(2, 64), codecs.get("int3-g32-asym"), "nearest")
    assert recode(zeros, codecs.get("int4-g32-asym")) is not None


def test_minimum_that_is_no_multiple_of_the_scale_is_refused() -> None:
    assert recode(made("Q4_1"), codecs.get("int4-g32-asym")) is None


def test_groups_that_blocks_do_not_divide() -> None:
    assert not any(c.family == "ggml" for c in candidates(codecs.get("int4-g48"), 96))
    assert recode(made("Q8_0"), codecs.get("int8-g64")) is None


def test_scales_too_large_for_float16() -> None:
    old = made("int4-g32-sf32")
    old.planes["scales"].mul_(1e6)
    assert recode(old, codecs.get("int4-g32")) is None
    assert recode(old, codecs.get("int4-g32-sbf16")) is None


def test_column_order_stays_where_it_can() -> None:
    old = made("int3-g32")
    ordered = QTensor(old.codec, old.shape, old.planes, torch.randperm(256, generator=torch.Generator().manual_seed(1)))
    assert recode(ordered, codecs.get("Q4_0")) is None
    wider = recode(ordered, codecs.get("int4-g32"))
    assert wider is not None and torch.equal(wider.dequantize(), ordered.dequantize())
