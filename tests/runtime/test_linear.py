"""Quantized modules against plain modules on decoded weights, forward and backward, both reference kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewbits import codecs
from fewbits.errors import FewbitsError
from fewbits.runtime.dispatch import choose
from fewbits.runtime.linear import QEmbedding, QLinear
from fewbits.solvers import solve

CODECS = ["int4-g32", "int3-g32-asym", "int8", "nf4", "nf4-dq", "Q8_0", "Q4_0", "Q5_0"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("kernel", ["decoded", "decode"])
@pytest.mark.parametrize("name", CODECS)
def test_linear_equals_linear_on_decoded_weight(name: str, kernel: str) -> None:
    torch.manual_seed(0)
    q = solve(torch.randn(24, 96), codecs.get(name))
    bias = nn.Parameter(torch.randn(24), requires_grad=True)
    layer = QLinear(choose(q, CPU, kernel).prepare(q, torch.float32), bias)
    x = torch.randn(2, 5, 96, requires_grad=True)
    y = torch.nn.functional.linear(x, q.dequantize(), bias)
    want = torch.autograd.grad(y.square().sum(), [x, bias])
    torch.testing.assert_close(layer(x), y)
    got = torch.autograd.grad(layer(x).square().sum(), [x, bias])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert layer.weight.dtype != torch.float32, "the weight holds packed codes"
    assert isinstance(layer, nn.Linear) and (layer.out_features, layer.in_features) == (24, 96)


@pytest.mark.parametrize("kernel", ["decoded", "decode"])
@pytest.mark.parametrize("name", CODECS)
def test_embedding_decodes_the_rows_asked_for(name: str, kernel: str) -> None:
    torch.manual_seed(0)
    q = solve(torch.randn(40, 64), codecs.get(name))
    layer = QEmbedding(choose(q, CPU, kernel).prepare(q, torch.float32), nn.Embedding(40, 64))
    ids = torch.tensor([[3, 39, 0], [7, 7, 1]])
    torch.testing.assert_close(layer(ids), q.dequantize()[ids], rtol=0, atol=0)


def test_an_unknown_kernel_lists_all_with_their_reasons() -> None:
    q = solve(torch.randn(4, 32), codecs.get("Q8_0"))
    reasons = "; ".join(f"{name}: not asked for .*" for name in ("native", "triton", "rowwise", "floats", "decoded",
                                                                "decode"))
    with pytest.raises(FewbitsError, match=reasons) as error:
        choose(q, CPU, "warp")
    assert "native, triton, rowwise, floats, decoded, decode" in (error.value.hint or "")
