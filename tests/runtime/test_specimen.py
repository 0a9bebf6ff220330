"""Random weights to measure on: values as in models, scales that differ, codes of all kinds."""

from __future__ import annotations

import pytest
import torch

from fewbits import codecs
from fewbits.runtime.specimen import SPREAD, copies, random_weight

NAMES = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "TQ2_0",
         "int2-g64", "int3-g128", "int4-g128", "int4-g128-asym", "int8-g128", "nf4", "nf4-dq", "fp4", "int8", "kmeans4",
         "BF16")


@pytest.mark.parametrize("name", NAMES)
def test_values_spread_as_in_models(name):
    torch.manual_seed(0)
    q = random_weight(codecs.get(name), (96, 512))
    values = q.dequantize()
    assert q.shape == (96, 512) and q.codec.name == codecs.get(name).name
    assert bool(values.isfinite().all()) and 0.5 * SPREAD < float(values.square().mean().sqrt()) < 3 * SPREAD
    assert 1.02 < float(values.std(1).max() / values.std(1).min()) < 10  # rows, hence scales, differ
    assert len(values[:, :32].unique()) > 2


def test_copies_are_equal_and_lie_apart():
    q = random_weight(codecs.get("int4-g128-asym"), (8, 256))
    first, second = copies(q, 2)
    for name, plane in q.planes.items():
        assert torch.equal(first.planes[name], plane) and torch.equal(second.planes[name], plane)
        assert len({first.planes[name].data_ptr(), second.planes[name].data_ptr(), plane.data_ptr()}) == 3
