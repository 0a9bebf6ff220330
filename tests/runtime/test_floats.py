"""Products with float weights as they are stored, against float64."""

from __future__ import annotations

import pytest
import torch

from fewbits import _native, codecs
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.runtime import floats
from fewbits.runtime.dispatch import choose
from fewbits.runtime.triton.available import interpreted

CPU = torch.device("cpu")
KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weight(name: str, rows: int, columns: int) -> QTensor:
    torch.manual_seed(0)
    data = torch.randn(rows, columns).to(KINDS[name])
    return QTensor(codecs.get(name), (rows, columns), {"data": data})


@pytest.mark.parametrize("shape", [(37, 200), (1, 33), (64, 1)])
@pytest.mark.parametrize("name", KINDS)
def test_products_gradients_and_rows(name: str, shape: tuple[int, int], instructions: str) -> None:
    q = weight(name, *shape)
    kernel = choose(q, CPU)
    assert kernel.name == "floats"
    layer, exact = kernel.prepare(q, torch.float32), q.planes["data"].double()
    assert layer.planes["data"] is q.planes["data"], "no copy"
    for count in (0, 1, 2, 5, 16, 40):
        x, bias = torch.randn(count, shape[1]), torch.randn(shape[0])
        torch.testing.assert_close(layer.matmul(x, None).double(), x.double() @ exact.T, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(layer.matmul(x, bias).double(), x.double() @ exact.T + bias, rtol=1e-5, atol=1e-4)
    g = torch.randn(3, shape[0])
    torch.testing.assert_close(layer.grad_input(g).double(), g.double() @ exact, rtol=1e-5, atol=1e-4)
    ids = torch.tensor([[0], [shape[0] - 1]])
    assert torch.equal(layer.rows(ids), q.planes["data"].float()[ids])


def test_few_rows_do_not_reach_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = floats.Floats().prepare(weight("BF16", 8, 64), torch.float32)
    monkeypatch.setattr("torch.nn.functional.linear", None)
    assert layer.matmul(torch.randn(2, 3, 64), None).shape == (2, 3, 8)
    assert layer.matmul(torch.randn(64).bfloat16(), None).dtype == torch.bfloat16
    with pytest.raises(TypeError):
        layer.matmul(torch.randn(floats.FEW[torch.bfloat16] + 1, 64), None)


def test_bad_arguments_are_errors_before_any_work() -> None:
    values, x, out = torch.ones(8, 64), torch.ones(2, 64), torch.full((2, 8), 7.0)
    for change, match in ((dict(threads=0), "0 threads"), (dict(threads=10_000), "10000 threads"),
                          (dict(values=values[:7]), "1792 bytes, not those of 8 x 64"),
                          (dict(kind="f16"), "2048 bytes"), (dict(kind="e8m0"), "f16, bf16 or f32"),
                          (dict(kind="f64"), "no scale is called f64"), (dict(bias=torch.ones(7)), "the bias's shape"),
                          (dict(x=torch.ones(3, 64)), "the result's shape")):
        arguments = dict(values=values, kind="f32", x=x, out=out, bias=None, threads=1) | change
        arguments["values"] = arguments["values"].view(torch.uint8)  # type: ignore[union-attr]
        with pytest.raises(ValueError, match=match):
            _native.multiply_floats(**arguments)  # type: ignore[arg-type]
    assert bool((out == 7).all())
    with pytest.raises(FewbitsError, match="activations of 63 columns, a weight of 64"):
        floats.Floats().prepare(weight("F32", 8, 64), torch.float32).matmul(torch.ones(1, 63), None)


def test_reasons() -> None:
    kernel, q = floats.Floats(), weight("F16", 8, 64)
    assert kernel.supports(q, CPU) is None
    assert kernel.supports(QTensor(codecs.get("Q8_0"), (8, 64), {}), CPU) == "Q8_0 is no plain float"
    assert kernel.supports(QTensor(q.codec, (2, 8, 64), {}), CPU) == "[2, 8, 64] is no matrix"
    assert kernel.supports(QTensor(q.codec, q.shape, q.planes, torch.arange(64)), CPU) == "an order of columns"
    with pytest.raises(FewbitsError) as error:
        choose(QTensor(codecs.get("kmeans4"), (4, 64), {}), CPU, without=("decoded", "decode"))
    triton = "only where it is asked for" if interpreted() else "not on cpu"
    assert str(error.value).startswith("no kernel computes kmeans4 [4, 64] on cpu: native: no native form of kmeans4; "
                                       f"triton: {triton}; rowwise: kmeans4 has no scale for each row alone, or "
                                       "not of 8 bits; ")
    assert str(error.value).endswith("decoded: ruled out; decode: ruled out")
