"""Fake quantization: quantized values, and straight-through gradients against autograd in float64."""

from __future__ import annotations

import pytest
import torch

from fewbits import solvers
from fewbits.codecs.base import decode_units, encode_units, fit_units
from fewbits.finetuning.fake import Fake
from fewbits.finetuning.student import _AsFiled
from fewbits.qtensor import QTensor
from tests.codecs import registry


def original(name: str) -> torch.Tensor:
    return registry.weights(registry.get(name)).reshape(6, -1)


def layer(name: str, learn_scales: bool = True, moved: float = 0.0, order: torch.Tensor | None = None) -> Fake:
    """On values that are not all the nearest, as those of GPTQ; then trained for a while."""
    w = original(name)
    torch.manual_seed(0)
    near = w + 0.5 * w.square().mean().sqrt() * torch.randn_like(w)
    q = solvers.solve(near, registry.get(name), "nearest")
    fake = Fake(QTensor(q.codec, q.shape, q.planes, order), None, w, learn_scales)
    fake.latent.data += moved * torch.randn_like(fake.latent)
    for f in fake.factors.values():
        f.data.uniform_(-moved, moved)
    return fake


@pytest.mark.parametrize("name", registry.ALL)
def test_begins_at_the_quantized_values(name: str) -> None:
    fake = layer(name)
    assert torch.equal(fake.result().dequantize(), fake.q.dequantize())
    x = torch.randn(3, fake.q.shape[1])
    assert torch.equal(fake(x), x @ fake.q.dequantize().T)


@pytest.mark.parametrize("name", registry.ALL)
def test_what_is_packed_is_what_was_multiplied_by(name: str) -> None:
    fake = layer(name, moved=0.3)
    x = torch.randn(3, fake.q.shape[1])
    with torch.no_grad():
        y, packed = fake(x), fake.result()
    assert torch.equal(y, x @ packed.dequantize().T)
    assert not torch.equal(packed.dequantize(), fake.q.dequantize())
    codes, params = packed.unpack()
    want = encode_units((fake.latent.detach() * fake.level).view(codes.shape), fake.q.codec, fake.params)
    if not fake.factors:  # decoded once more: two codes may stand for one value
        assert torch.equal(decode_units(codes, fake.q.codec, params), decode_units(want, fake.q.codec, fake.params))
    else:
        assert torch.equal(codes, want)


@pytest.mark.parametrize("name", ["int2", "int3-g32-asym", "int8", "nf4-b32", "nf4-dq", "kmeans3", "MXFP4", "Q2_K",
                                  "Q3_K", "Q4_1", "TQ2_0", "fp8-e4m3"])
def test_gradients_go_straight_through(name: str) -> None:
    fake = layer(name, moved=0.2)
    codec, columns = fake.q.codec, fake.q.shape[1]
    x, g = torch.randn(5, columns, requires_grad=True), torch.randn(5, 6)
    (fake(x) * g).sum().backward()
    rounded = fake.result().dequantize().double()
    latent = fake.latent.detach().double().requires_grad_()
    factors = {k: f.detach().double().requires_grad_() for k, f in fake.factors.items()}
    weight = rounded + fake.level * (latent - latent.detach())
    for k, f in factors.items():  # its value is that of `rounded` already
        alone = {n: p if n == k or n not in factors else torch.zeros_like(p) for n, p in fake.params.items()}
        step = fake.gain * (f - f.detach())[..., 0]
        values = decode_units(fake.codes, codec, alone).double().view(6, columns)
        weight = weight + values * step.view(6, -1).repeat_interleave(codec.unit(columns), 1)[:, :columns]
    again = x.detach().double().requires_grad_()
    (again @ weight.T * g.double()).sum().backward()
    assert x.grad is not None and fake.latent.grad is not None and again.grad is not None and latent.grad is not None
    assert torch.allclose(x.grad.double(), again.grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(fake.latent.grad.double(), latent.grad, rtol=1e-4, atol=1e-5)
    assert set(factors) == set(codec.linear)
    for k, f in fake.factors.items():
        want = factors[k].grad
        assert f.grad is not None and want is not None
        assert torch.allclose(f.grad.double(), want, rtol=2e-3, atol=2e-3 * float(want.abs().max())), k


def test_latent_weights_begin_near_the_original() -> None:
    fake, w = layer("int3"), original("int3")
    value, latent = fake.q.dequantize(), fake.latent.detach() * fake.level
    nearest = torch.isclose(latent, w, atol=1e-6)
    assert 0.05 < float(nearest.float().mean()) < 0.95
    off, whole = (latent - value)[~nearest], (w - value)[~nearest]
    assert bool((off * whole >= 0).all()) and bool((off.abs() < whole.abs()).all())
    scale = fake.params["scale"][..., 0].abs().repeat_interleave(64, 1)[~nearest]
    assert float((off.abs() / scale).max()) < 0.26 and float((off.abs() / scale).median()) > 0.2  # the edge is at 0.5


def test_without_learned_scales_only_weights_are_trained() -> None:
    fake = layer("int2", learn_scales=False)
    assert [n for n, _ in fake.named_parameters()] == ["latent"]
    x = torch.randn(3, fake.q.shape[1])
    fake(x).sum().backward()
    assert fake.latent.grad is not None
    assert torch.allclose(fake.latent.grad, fake.level * x.sum(0).expand(6, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["int2", "Q2_K", "nf4-dq", "kmeans2", "fp8-e4m3-b48"])
def test_parameters_fitted_anew(name: str) -> None:
    fake = layer(name, learn_scales=False, moved=2.0)
    latent = (fake.latent.detach() * fake.level).view(fake.codes.shape)
    codec = fake.q.codec
    want = fit_units(latent, codec, None, codec.begin(latent, None))
    before = float((fake.result().dequantize().view(latent.shape) - latent).square().sum())
    fake.refit()
    assert all(torch.equal(fake.params[k], want[k]) for k in want)
    assert set(fake.state_dict()) >= {f"fitted_{k}" for k in want}
    assert float((fake.result().dequantize().view(latent.shape) - latent).square().sum()) < before


def test_columns_in_an_order_of_their_own() -> None:
    order = torch.randperm(384, generator=torch.Generator().manual_seed(0))
    fake = layer("int4-g32", moved=0.3, order=order)
    x = torch.randn(4, 384)
    assert torch.allclose(fake(x), x @ fake.result().dequantize().T, atol=1e-5)
    assert torch.equal(fake.result().order, order)


def test_floats_are_as_their_file_rounds_them() -> None:
    start = torch.randn(64).half().float()
    filed = _AsFiled(start, torch.float16, 0.5)
    change = torch.zeros(64, requires_grad=True)
    assert torch.equal(filed(change), start)
    value = filed(change + 0.01)
    assert torch.equal(value, (start + 0.01 * filed.size).half().float()) and not torch.equal(value, start)
    value.sum().backward()
    assert torch.allclose(change.grad, torch.full((64,), filed.size))
