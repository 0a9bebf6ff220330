"""Layers whose weight's type others look at, and packed layers that are cast, copied and pickled."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fewbits import codecs
from fewbits.errors import FewbitsError
from fewbits.runtime.dispatch import choose
from fewbits.runtime.linear import QEmbedding, QLinear, holds_packed
from fewbits.runtime.shown import show_types
from fewbits.solvers import solve

CPU = torch.device("cpu")
CODECS = ["int8", "nf4", "nf4-dq", "Q4_K", "int4-g32-asym", "w8a8", "kmeans4", "fp8-e4m3"]


def layer(name: str = "nf4") -> QLinear:
    torch.manual_seed(0)
    q = solve(torch.randn(48, 256), codecs.get(name))
    return QLinear(choose(q, CPU).prepare(q, torch.float32), nn.Parameter(torch.randn(48), requires_grad=False))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.looked_at, self.other = layer(), layer()
        self.blocks = nn.ModuleList([nn.Sequential(layer())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(x) + self.looked_at(x.to(self.looked_at.weight.dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0][0].weight.dtype


class Derived(Inner):
    """What is looked at stands in the source of the class that it is derived from."""


@pytest.mark.parametrize("kind", [Inner, Derived])
def test_what_is_looked_at_shows_a_float_type(kind: Any) -> None:
    outer = nn.ModuleDict({"inner": kind()})
    inner, x = outer["inner"], torch.randn(3, 256)
    want = inner.other(x) + inner.looked_at(x)
    with pytest.raises(FewbitsError, match="activations of torch.uint8"):
        inner(x)
    show_types(outer, torch.float32)
    assert torch.equal(inner(x), want)
    assert (inner.looked_at.weight.dtype, inner.dtype) == (torch.float32, torch.float32)
    assert inner.other.weight.dtype == torch.uint8
    assert inner.looked_at.weight.numel() == 0 and "plane_codes" in dict(inner.looked_at.named_buffers())
    outer.bfloat16()
    assert inner.looked_at.weight.dtype == torch.bfloat16 and inner(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", CODECS)
def test_casts_leave_the_planes_alone(name: str) -> None:
    made, x = layer(name), torch.randn(3, 256)
    planes = {n: p.clone() for n, p in made.state_dict().items() if n != "bias"}
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        made.to(dtype)
        assert made(x.to(dtype)).dtype == dtype
    assert all(torch.equal(made.state_dict()[n], p) for n, p in planes.items())


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies(how: Any, name: str, shown: bool) -> None:
    made, x = layer(name), torch.randn(3, 256)
    if shown:
        made.show(torch.float32)
    if hasattr(made.prepared, "outliers"):
        made.prepared.outliers = 2.0
    again = how(made)
    assert torch.equal(again(x), made(x)) and again.weight.dtype == made.weight.dtype
    assert getattr(again.prepared, "outliers", 2.0) == 2.0
    own = [p for n, p in again.state_dict().items() if n != "bias"]
    held = {p.data_ptr() for p in again.prepared.planes.values()}
    assert {p.data_ptr() for p in own if p.numel()} == held, "the module's planes are those that the kernel reads"
    assert not held & {p.data_ptr() for p in made.prepared.planes.values()}


def test_copies_share_what_is_tied() -> None:
    q = solve(torch.randn(40, 64), codecs.get("Q8_0"))
    prepared = choose(q, CPU).prepare(q, torch.float32)
    pair = nn.ModuleList([QEmbedding(prepared, nn.Embedding(40, 64)), QLinear(prepared, None)])
    first, second = copy.deepcopy(pair)
    assert first.prepared is second.prepared is not prepared


def test_attention_that_multiplies_by_itself_holds_no_packed_weight() -> None:
    attention = nn.MultiheadAttention(64, 4)
    assert not holds_packed(attention.out_proj) and holds_packed(nn.Linear(2, 2))
