"""The Triton kernels of integer products against those in torch, which are tested against the papers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from fewbits import codecs
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.runtime.dispatch import choose
from fewbits.runtime.triton import configs, rowwise
from fewbits.runtime.triton.configs import Config
from fewbits.runtime.triton.rowwise import Tiled
from fewbits.solvers import solve

NAMES = ["int8", "w8a8", "w8a8-static", "w8a8-asym", "w8a8-static-asym-sf32"]
OUTS, COLUMNS = 37, 100
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")  # 0 / 0, of numpy in the interpreter
CPU, DEVICE = torch.device("cpu"), torch.device("cuda" if torch.cuda.is_available() else "cpu")


def weight(name: str, rows: int = OUTS, columns: int = COLUMNS) -> QTensor:
    torch.manual_seed(0)
    codec = codecs.get(name)
    q = solve(torch.randn(rows, columns) + (0.7 if "asym" in name else 0.0), codec)
    return replace(q, planes=codec.calibrated(q.planes, torch.tensor([2.5])))


def activations(rows: int, columns: int = COLUMNS) -> torch.Tensor:
    torch.manual_seed(rows)
    x = torch.randn(rows, columns)
    x[rows // 2] = 0 if rows > 1 else x[0]
    return x


def both(q: QTensor, x: torch.Tensor, bias: torch.Tensor | None = None,
         outliers: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What the Triton kernels compute of `x`, and what torch does."""
    tiled, plain = Tiled(q.to(DEVICE), x.dtype), choose(q, CPU, "rowwise").prepare(q, x.dtype)
    for way in (tiled, plain):
        vars(way)["outliers"] = outliers
    got = tiled.matmul(x.to(DEVICE), None if bias is None else bias.to(DEVICE)).cpu()
    want = plain.matmul(x, bias)
    assert got.dtype == want.dtype == x.dtype and got.shape == want.shape
    return got, want


def equal(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Bit for bit, but that the interpreter cuts off what bfloat16 has no room for."""
    if got.dtype == torch.bfloat16 and DEVICE == CPU:
        return bool(((got.view(torch.int16) - want.view(torch.int16)).abs() <= 1).all())
    return torch.equal(got, want)


@pytest.mark.parametrize("rows", [1, 3, 17, 70])
@pytest.mark.parametrize("name", NAMES)
def test_products_of_integers_are_equal_bit_for_bit(name: str, rows: int) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        got, want = both(weight(name), activations(rows).to(dtype), torch.randn(OUTS).to(dtype))
        assert equal(got, want)


@pytest.mark.parametrize("config", [Config(16, 16, 1), Config(16, 16, 4), Config(64, 32, 2), Config(32, 64, 2, 8, 1)])
def test_however_it_is_cut(config: Config, monkeypatch) -> None:
    monkeypatch.setattr(rowwise, "WIDE", 32)  # several blocks; fewer than parts
    x = activations(40)
    with configs.trying({"rowwise": config}):
        for name in ("int8", "w8a8-asym"):
            got, want = both(weight(name), x.view(2, 20, COLUMNS), torch.randn(OUTS))
            assert equal(got, want)
        got, want = both(weight("int8"), x, outliers=2.5)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_tiles_become_smaller_where_memory_does_not_suffice(monkeypatch) -> None:
    """Parts and counters are those of the tiles that there are at last."""
    plain, sizes = rowwise.multiply, []

    class Scarce:
        def __getitem__(self, grid):
            def launch(*args, **constants):
                sizes.append((constants["N"], constants["num_stages"]))
                if constants["N"] > 16 or constants["num_stages"] > 1:
                    raise OutOfResources(1 << 20, 1 << 16, "shared memory")
                plain[grid](*args, **constants)

            return launch

    monkeypatch.setattr(rowwise, "multiply", Scarce())
    monkeypatch.setattr(configs, "_instead", {})
    monkeypatch.setattr(configs, "lookup", lambda *_: Config(64, 16, 2, stages=2))
    x = activations(20)
    for _ in range(2):
        got, want = both(weight("w8a8"), x)
        assert equal(got, want)
    assert sizes == [(64, 2), (64, 1), (32, 1), (16, 1), (16, 1)]  # the second time at once


@pytest.mark.parametrize("rows, split", [(16, 4), (256, 4), (512, 2), (4096, 1)])
def test_many_rows_need_no_parts(rows: int, split: int, monkeypatch) -> None:
    """Configurations are those of 256 rows at most."""
    seen = []

    class Seen:
        def __getitem__(self, grid):
            return lambda *args, **constants: seen.append(constants.get("SPLIT"))

    monkeypatch.setattr(rowwise, "multiply", Seen())
    monkeypatch.setattr(rowwise, "round_rows", Seen())
    with configs.trying({"rowwise": Config(64, 64, 4)}):
        Tiled(weight("w8a8").to(DEVICE), torch.float16).matmul(torch.zeros(rows, COLUMNS, device=DEVICE), None)
    assert seen == [None, split]


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("dtype, off", [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_outliers_meet_the_weight_in_floating_point(rows: int, dtype: torch.dtype, off: float) -> None:
    q, x = weight("int8"), activations(rows)
    x[-1, [5, 60, 99]] *= 20
    x = x.to(dtype)
    for outliers in (0.0, 6.0, 1.5, 1e-9):  # none, one block's few, many, all but zeros
        got, want = both(q, x, torch.randn(OUTS).to(dtype), outliers)
        torch.testing.assert_close(got, want, rtol=off, atol=off)
    exact = x.double() @ q.dequantize().double().T
    torch.testing.assert_close(both(q, x, None, 1e-9)[0].double(), exact, rtol=off, atol=off)


def test_one_value_at_the_threshold_makes_its_column_one() -> None:
    q, x = weight("int8"), torch.zeros(2, COLUMNS)
    x[0, 3], x[1, 98] = 6.0, 5.99
    got, w = both(q, x, None, 6.0)[0], q.dequantize()
    torch.testing.assert_close(got[0], 6.0 * w[:, 3], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1], 127 * torch.tensor(5.99 / 127) * w[:, 98], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize("name", ["int8", "w8a8", "w8a8-static"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_number_stays_in_its_row(name: str, value: float, rows: int) -> None:
    x = activations(rows)
    x[0, 7], x[1, 7] = value, 9.0
    for outliers in (None, 6.0):
        got, want = both(weight(name), x, None, outliers)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert got[1:].isfinite().all() and got[0].isfinite().all() == ("static" in name)


def test_halves_are_rounded_to_even() -> None:
    """Codes, not only products: an identity as the weight shows them."""
    q = weight("w8a8-static-sf32", 16, 16)
    q = replace(q, planes={"codes": torch.eye(16, dtype=torch.int8), "scales": torch.ones(16, 1),
                           "inputs": torch.ones(16, 1)})
    x = torch.tensor([-200, -128.5, -127.5, -2.5, -1.5, -0.5, -0.49, 0, 0.5, 1.5, 2.5, 126.5, 127.4, 127.5, 128, 1e30])
    got, want = both(q, x[None])
    assert equal(got, want)
    assert got[0].tolist() == [-128, -128, -128, -2, -2, 0, 0, 0, 0, 2, 2, 126, 127, 127, 127, 127]


def test_the_operator_under_autograd_and_compilation() -> None:
    for name, outliers in (("int8", 2.0), ("w8a8-static-asym-sf32", 0.0)):
        q = weight(name)
        prepared = Tiled(q.to(DEVICE), torch.float32)
        x, bias = activations(3).to(DEVICE).requires_grad_(), torch.randn(OUTS, device=DEVICE, requires_grad=True)
        planes = prepared.planes["codes"], prepared.by_row, prepared.planes.get("zeros"), prepared.planes.get("inputs")
        torch.library.opcheck(rowwise.product, (x, *planes, bias, 127.0, outliers))
        g = torch.randn(3, OUTS, device=DEVICE)
        rowwise.product(x, *planes, bias, 127.0, outliers).backward(g)
        torch.testing.assert_close(x.grad, g @ prepared.q.dequantize())
        torch.testing.assert_close(bias.grad, g.sum(0))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_decode_some_columns_at_a_time(name: str, monkeypatch) -> None:
    monkeypatch.setattr(rowwise, "DECODED", 40 * OUTS)
    q, g = weight(name).to(DEVICE), torch.randn(2, 3, OUTS, device=DEVICE)
    for dtype, off in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        got = Tiled(q, dtype).grad_input(g.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), g.to(dtype).float() @ q.dequantize(), rtol=off, atol=off * 10)


def test_rows_no_rows_and_wrong_columns() -> None:
    q = weight("w8a8").to(DEVICE)
    prepared = Tiled(q, torch.float16)
    ids = torch.tensor([[3, 0]], device=DEVICE)
    assert torch.equal(prepared.rows(ids), q.dequantize(torch.float16)[ids])
    assert prepared.matmul(torch.zeros(2, 0, COLUMNS, device=DEVICE), None).shape == (2, 0, OUTS)
    with pytest.raises(FewbitsError, match="activations of 99 columns"):
        prepared.matmul(torch.zeros(1, 99), None)
