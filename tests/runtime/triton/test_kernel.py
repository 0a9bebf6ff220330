"""Products of weights of few bits in Triton against decoded weights in float64."""

from __future__ import annotations

import pickle
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch import nn

from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.runtime.dispatch import choose
from fewbits.runtime.linear import packed
from fewbits.runtime.triton import available, configs
from fewbits.runtime.triton.available import interpreted
from fewbits.runtime.triton.configs import Config
from fewbits.runtime.triton.kernel import OnGpu, Triton, side_by_side
from tests.runtime.triton.test_layout import NAMES, weight

# normalised squared errors: of sums in float32, results in float16, scales and offsets in float16,
# results in bfloat16, which the interpreter cuts off instead of rounding
EXACT, ROUNDED, SCALED, BRAIN = 1e-11, 2e-7, 1e-6, 3e-5
SMALL = {"matvec": Config(16, 1), "tile": Config(16, 16), "decode": Config(16)}
SHARED = {"matvec": Config(32, 1, 4), "tile": Config(16, 32, 2), "decode": Config(32)}


@pytest.fixture
def on(device: str) -> torch.device:
    return torch.device(device)


def prepared(q: QTensor, on: torch.device, dtype: torch.dtype = torch.float32) -> OnGpu:
    found = choose(q, on, "triton").prepare(q.to(on), dtype)
    assert isinstance(found, OnGpu)
    return found


def nmse(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double().cpu() - want).square().sum() / want.square().sum())


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    return (torch.randn(shape) + 0.5).to(dtype)  # a mean of their own: sums of levels do not cancel


@pytest.mark.parametrize("name", NAMES)
def test_every_codec(name: str, on: torch.device) -> None:
    q = weight(name, 37, 256)
    p, want = prepared(q, on), q.dequantize().double()
    sizes = [plane.numel() * plane.element_size() for plane in p.planes.values()]
    most = Triton().nbytes(q.codec, q.shape, p.dtype)
    assert most - 1024 < sum(sizes) <= most  # rows that fill up 16, tables of levels
    bound = SCALED if name[:2] in ("nf", "fp", "Q2", "Q3", "Q4", "Q5", "Q6", "IQ", "MX") else EXACT
    with configs.trying(SMALL):
        for rows in (1, 6):
            x = activations(rows, 256)
            assert nmse(p.matmul(x.to(on), None), x.double() @ want.T) < bound, rows
        ids = torch.tensor([[36, 0], [5, 5]])
        assert nmse(p.rows(ids.to(on)), want[ids]) < bound


@pytest.mark.parametrize("name", ["int4-g64-asym", "int3-g32", "nf4"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 33])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_odd_shapes_shared_columns_and_bias(name: str, rows: int, dtype: torch.dtype, on: torch.device) -> None:
    if dtype == torch.bfloat16 and rows > 1 and interpreted():
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as integers; needs a GPU")
    q = weight(name, 45, 320)
    p, bias = prepared(q, on), torch.randn(45).to(dtype)
    x = activations(rows, 320, dtype=dtype)
    want = x.double() @ q.dequantize().double().T + bias.double()
    with configs.trying(SHARED):
        first = p.matmul(x.to(on), bias.to(on))
        assert nmse(first, want) < (ROUNDED if dtype == torch.float16 else BRAIN)
        assert torch.equal(p.matmul(x.to(on), bias.to(on)), first)  # sums in one order, counters ready again
    assert not p.planes["arrived"].any()


def test_many_rows_are_multiplied_by_the_library(on: torch.device) -> None:
    q = weight("Q4_K", 40, 256)
    p, x, bias = prepared(q, on), activations(2, 9, 256), torch.randn(40)
    want = x.double() @ q.dequantize().double().T + bias.double()
    with configs.trying(SMALL, dense=18):
        found = p.matmul(x.to(on), bias.to(on))
    assert found.shape == (2, 9, 40) and nmse(found, want) < SCALED


@pytest.mark.parametrize("name", ["int4-g32-asym", "kmeans3", "Q6_K"])
@pytest.mark.parametrize("rows", [1, 50])
def test_experts(name: str, rows: int, on: torch.device) -> None:
    q = weight(name, 5, 24, 256)
    x, experts = activations(rows, 256), (torch.arange(rows) * 7 % 5).clamp(max=3)  # nobody asks the last
    want = torch.einsum("ni,noi->no", x.double(), q.dequantize().double()[experts])
    with configs.trying(SMALL):
        assert nmse(prepared(q, on).grouped(x.to(on), experts.to(on)), want) < SCALED


def test_gradients(on: torch.device) -> None:
    q = weight("int4-g64-asym", 40, 192)
    layer = packed(prepared(q, on), nn.Linear(192, 40, device=on))
    x = activations(2, 5, 192).to(on).requires_grad_()
    g = torch.randn(2, 5, 40)
    with configs.trying(SMALL):
        layer(x).backward(g.to(on))
    assert x.grad is not None and layer.bias is not None and layer.bias.grad is not None
    assert nmse(x.grad, g.double() @ q.dequantize().double()) < EXACT
    assert nmse(layer.bias.grad, g.double().sum((0, 1))) < EXACT


def test_order_of_columns(on: torch.device) -> None:
    q = weight("int4-g32", 24, 128)
    q = QTensor(q.codec, q.shape, q.planes, torch.randperm(128))
    p, want, x, g = prepared(q, on), q.dequantize().double(), activations(3, 128), torch.randn(3, 24)
    with configs.trying(SMALL):
        assert nmse(p.matmul(x.to(on), None), x.double() @ want.T) < EXACT
        assert nmse(p.grad_input(g.to(on)), g.double() @ want) < EXACT
        assert nmse(p.rows(torch.tensor([7], device=on)), want[[7]]) < EXACT


@pytest.mark.parametrize("name", ["int4-g32", "nf4", "kmeans2"])
def test_side_by_side(name: str, on: torch.device) -> None:
    parts = [weight(name, rows, 128) for rows in (20, 9, 16)]
    joined = side_by_side([prepared(q, on) for q in parts])
    assert joined is not None and joined.shape == (45, 128)
    x = activations(2, 128)
    with configs.trying(SMALL):
        found = joined.matmul(x.to(on), None)
    assert nmse(found, x.double() @ torch.cat([q.dequantize() for q in parts]).double().T) < SCALED
    with pytest.raises(FewbitsError, match="side by side"):
        _ = joined.q
    assert side_by_side([prepared(parts[0], on), prepared(weight("Q4_K", 8, 256), on)]) is None


def test_the_tensor_again(on: torch.device) -> None:
    q = weight("nf4-dq", 40, 128)
    p = prepared(q, on)
    again = pickle.loads(pickle.dumps(p))
    for found in (p.q, again.q):
        assert all(torch.equal(found.planes[name], q.planes[name]) for name in q.planes)


def test_what_is_refused(on: torch.device) -> None:
    p = prepared(weight("int4-g32", 2, 16, 64), on)
    with pytest.raises(FewbitsError, match="needs the expert of every row"):
        p.matmul(torch.zeros(1, 64, device=on), None)
    with pytest.raises(FewbitsError, match="one for each row|experts"):
        p.grouped(torch.zeros(2, 64, device=on), torch.zeros(3, dtype=torch.long, device=on))
    with pytest.raises(FewbitsError, match="activations of torch.float64"):
        p.grouped(torch.zeros(2, 64, device=on, dtype=torch.float64), torch.zeros(2, dtype=torch.long, device=on))
    with pytest.raises(FewbitsError, match="32 columns"):
        p.grouped(torch.zeros(2, 32, device=on), torch.zeros(2, dtype=torch.long, device=on))


def test_triton_that_is_missing_or_old_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    for version, reason in ((absent, "triton is not installed (pip install 'fewbits[gpu]')"),
                            (lambda name: "3.2.0", "triton 3.2.0 is older than 3.4")):
        monkeypatch.setattr(available, "version", version)
        available._missing.cache_clear()
        assert Triton().supports(weight("int4-g32", 16, 64), gpu) == reason
    monkeypatch.undo()
    available._missing.cache_clear()
