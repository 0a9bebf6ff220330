"""The products as operators: what torch checks of them, and compiled layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewbits.runtime.dispatch import choose
from fewbits.runtime.linear import packed
from fewbits.runtime.triton import configs, ops
from fewbits.runtime.triton.kernel import OnGpu
from tests.runtime.triton.test_kernel import SMALL
from tests.runtime.triton.test_layout import weight


@pytest.fixture(scope="module")
def matrix(device: str) -> OnGpu:
    on = torch.device(device)
    q = weight("int3-g32-asym", 24, 192)
    found = choose(q, on, "triton").prepare(q.to(on), torch.float32)
    assert isinstance(found, OnGpu)
    return found


@pytest.fixture(autouse=True)
def small():
    with configs.trying(SMALL):
        yield


def test_products(matrix: OnGpu) -> None:
    planes, on = list(matrix.planes.values()), matrix.device
    bias = torch.randn(24, device=on, requires_grad=True)
    x = torch.randn(2, 3, 192, device=on, requires_grad=True)
    torch.library.opcheck(ops.product, (x, planes, bias, matrix._spelling))
    torch.library.opcheck(ops.product, (x.detach()[0], planes, None, matrix._spelling))
    torch.library.opcheck(ops.product_gradient, (torch.randn(2, 24, device=on), planes, matrix._spelling))


def test_rows(matrix: OnGpu) -> None:
    ids = torch.tensor([[3, 1]], device=matrix.device)
    torch.library.opcheck(ops.rows, (ids, list(matrix.planes.values()), matrix._spelling, torch.float16))


def test_grouped(device: str) -> None:
    on = torch.device(device)
    q = weight("int4-g32", 3, 16, 128)
    p = choose(q, on, "triton").prepare(q.to(on), torch.float32)
    assert isinstance(p, OnGpu)
    x, experts = torch.randn(4, 128, device=on), torch.tensor([2, 0, 0, 1], device=on)
    torch.library.opcheck(ops.grouped, (x, experts, list(p.planes.values()), p._spelling))


def test_compiled_layers_have_no_breaks(matrix: OnGpu) -> None:
    layer = packed(matrix, nn.Linear(192, 24, device=matrix.device))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, again = (torch.randn(5, 192, device=matrix.device).requires_grad_() for _ in range(2))
    again.data.copy_(x.data)
    layer(x).square().sum().backward()
    compiled(again).square().sum().backward()
    torch.testing.assert_close(again.grad, x.grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
