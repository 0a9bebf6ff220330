"""Layers with tunable scales: quantized values, and the gradients of a dense product in float64."""

from __future__ import annotations

import pytest
import torch

from fewbits import codecs, solvers
from fewbits.codecs.base import decode_units
from fewbits.finishing.tuned import Tuned

LINEAR = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "TQ1_0",
          "TQ2_0", "Q1_0", "int2-g64", "int3-row", "int4-g32-asym", "int8", "nf4", "fp4-b128", "fp8-e4m3")


def layer(name: str, rows: int = 6, columns: int = 512) -> Tuned:
    torch.manual_seed(0)
    tuned = Tuned(solvers.solve(torch.randn(rows, columns), codecs.get(name), "nearest"), None)
    for f in tuned.factors.values():
        f.data.uniform_(-0.1, 0.1)
    return tuned


@pytest.mark.parametrize("name", LINEAR)
def test_gradients_of_factors(name: str) -> None:
    """Against autograd through the sum of scaled parameters times what they stand for, in float64."""
    tuned = layer(name)
    x, g = torch.randn(5, 512, requires_grad=True), torch.randn(5, 6)
    (tuned(x) * g).sum().backward()
    codec, factors = tuned.q.codec, {k: f.detach().double().requires_grad_() for k, f in tuned.factors.items()}
    weight = torch.zeros(6, 512, dtype=torch.float64)
    for k, f in factors.items():
        alone = {n: p if n == k or n not in factors else torch.zeros_like(p) for n, p in tuned.params.items()}
        values = decode_units(tuned.codes, codec, alone).double()
        weight = weight + values * (1 + f[..., 0]).repeat_interleave(codec.unit(512), 1)
    again = x.detach().double().requires_grad_()
    (again @ weight.T * g.double()).sum().backward()
    assert torch.allclose(x.grad.double(), again.grad, rtol=1e-4, atol=1e-4)
    for k, f in tuned.factors.items():
        want = factors[k].grad
        assert torch.allclose(f.grad.double(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max())), k


@pytest.mark.parametrize("name", LINEAR)
def test_result_holds_the_tuned_values(name: str) -> None:
    """To the rounding of a scale in half precision; codes are the same."""
    tuned = layer(name)
    found = tuned.result()
    assert torch.equal(found.unpack()[0], tuned.codes)
    assert torch.allclose(found.dequantize(), tuned.weight(), rtol=1e-3, atol=4e-3)
    assert not torch.allclose(found.dequantize(), tuned.q.dequantize(), rtol=1e-3, atol=4e-3)


def test_blocks_that_cross_rows() -> None:
    tuned = layer("nf4", rows=3, columns=96)
    x = torch.randn(4, 96)
    assert torch.allclose(tuned(x), x @ tuned.result().dequantize().T, atol=1e-4)
    tuned(x).sum().backward()
    assert float(tuned.factors["absmax"].grad.abs().min()) > 0


def test_columns_in_an_order_of_their_own() -> None:
    from fewbits.qtensor import QTensor

    plain = layer("int4-g32")
    order = torch.randperm(512)
    tuned = Tuned(QTensor(plain.q.codec, plain.q.shape, plain.q.planes, order), None)
    x = torch.randn(4, 512)
    assert torch.allclose(tuned(x), x @ tuned.q.dequantize().T, atol=1e-4)
    assert torch.equal(tuned.result().order, order)


@pytest.mark.parametrize("name", ["Q3_K", "Q4_K", "Q4_1", "int4-g32", "nf4"])
def test_no_layer_can_tune_what_units_share(name: str) -> None:
    """Every linear parameter is one value a unit, of a floating type, and values are linear in it."""
    tuned = layer(name)
    for k in tuned.factors:
        p = tuned.params[k]
        assert p.shape[-1] == 1 and p.is_floating_point()
    twice = {k: p * 2 if k in tuned.factors else p for k, p in tuned.params.items()}
    one = decode_units(tuned.codes, tuned.q.codec, tuned.params)
    assert torch.allclose(decode_units(tuned.codes, tuned.q.codec, twice), 2 * one, rtol=1e-5, atol=1e-6)
