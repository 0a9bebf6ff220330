"""Native products against decoding and multiplying in float64: every codec, with every set of kernels."""

from __future__ import annotations

import math
import os

import pytest
import torch

from fewbits import _native, codecs
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.runtime.cpu import Cpu, Native, multiply
from fewbits.runtime.dispatch import choose
from fewbits.runtime.interleaved import MIDDLE, form
from fewbits.solvers import solve

CPU = torch.device("cpu")
NAMES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
         "TQ1_0", "TQ2_0", "Q1_0", "int2-g64", "int3-g64", "int4-g128", "int8-g128", "int4-row", "int2-g64-asym",
         "int3-g64-asym", "int4-g32-asym", "int8-g128-asym", "int4-g128-sbf16", "int4-g128-sf32", "nf4", "nf4-b128",
         "nf4-dq", "fp4", "int8"]
ROWS = (1, 2, 3, 4, 5, 6, 7, 11, 13, 20, 40)  # every width of panels, on every set of instructions
PRODUCT, ROUNDED_ALIKE = 5e-4, 1e-6  # normalised mean squared errors


def prepared(name: str, rows: int = 40, columns: int = 512) -> tuple[QTensor, Native]:
    torch.manual_seed(0)
    q = solve(torch.randn(rows, columns), codecs.get(name))
    native = choose(q, CPU, "native").prepare(q, torch.float32)
    assert isinstance(native, Native)
    return q, native


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Activations as the kernels round them: 32 columns a scale of 12 bits, codes -127 … 127."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    scale = (blocks.abs().amax(-1, keepdim=True) * (1 / 127)).view(torch.int32)
    scale = ((scale + 0xFFF) & ~0xFFF).view(torch.float32)
    codes = (blocks * (1 / scale).nan_to_num(0, 0, 0)).round()
    return (codes.double() * scale.double()).flatten(1)[:, :x.shape[1]]


def with_rounded_levels(q: QTensor) -> torch.Tensor:
    """The weight with the levels of its table rounded to bytes."""
    f, weight = form(q.codec), q.dequantize().double()
    assert f is not None
    if not f.values:
        return weight
    values, levels = torch.tensor(f.values, dtype=torch.float64), torch.tensor(f.levels) - MIDDLE
    ratio = torch.where(values == 0, 0.0, levels / torch.where(values == 0, 1.0, values))
    return weight * ratio[q.unpack()[0].long()]


def nmse(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).square().sum() / want.square().sum())


@pytest.mark.parametrize("name", NAMES)
def test_products(name: str, instructions: str) -> None:
    q, native = prepared(name)
    exact, alike = q.dequantize().double(), with_rounded_levels(q)
    for rows in ROWS:
        x, bias = torch.randn(rows, 512), torch.randn(40)
        got = native.matmul(x, bias) - bias
        assert nmse(got, x.double() @ exact.T) < PRODUCT, rows
        assert nmse(got, rounded(x) @ alike.T) < ROUNDED_ALIKE, rows


@pytest.mark.parametrize("name, rows, columns", [("int4-row", 17, 172), ("int8", 5, 33), ("int4-g128", 1, 172),
                                                 ("Q8_0", 33, 96), ("int3-g64-asym", 15, 70), ("nf4", 31, 64),
                                                 ("int4-g32", 16, 1), ("Q4_K", 1, 1280)])
def test_odd_shapes(name: str, rows: int, columns: int, instructions: str) -> None:
    q, native = prepared(name, rows, columns)
    alike = with_rounded_levels(q)
    for count in (1, 9):
        x = torch.randn(count, columns)
        assert nmse(native.matmul(x, None), rounded(x) @ alike.T) < ROUNDED_ALIKE
    assert native.matmul(torch.zeros(0, columns), None).shape == (0, rows)
    assert torch.equal(native.matmul(torch.zeros(2, columns), None), torch.zeros(2, rows))


def test_activations_of_any_shape_stride_and_type() -> None:
    q, native = prepared("Q4_0")
    weight = q.dequantize().double()
    x = torch.randn(3, 2, 512)
    assert native.matmul(x, None).shape == (3, 2, 40)
    for strange in (torch.randn(512 * 3 + 1)[1:].view(3, 512), torch.randn(512, 3).T, torch.randn(3, 512).bfloat16()):
        got = native.matmul(strange, torch.zeros(40))
        assert got.dtype == strange.dtype
        assert nmse(got, strange.double() @ weight.T) < PRODUCT


def test_what_is_not_finite_spoils_only_its_row(instructions: str) -> None:
    _, native = prepared("Q4_K")
    x = torch.randn(7, 512)
    x[2, 7], x[5, 300] = math.nan, -math.inf
    got = native.matmul(x, None)
    assert got.isnan().all(1).tolist() == [False, False, True, False, False, True, False]
    assert not got[[0, 1, 3, 4, 6]].isnan().any()


@pytest.mark.parametrize("name", NAMES)
def test_the_canonical_planes_come_back(name: str) -> None:
    q, native = prepared(name)
    again = native.q
    assert again.shape == q.shape and again.codec == q.codec
    for key, plane in q.planes.items():
        assert torch.equal(again.planes[key], plane), key


@pytest.mark.parametrize("name", NAMES)
def test_rows_columns_and_gradient(name: str, instructions: str) -> None:
    q, native = prepared(name)
    weight, ids = q.dequantize(), torch.tensor([[3, 39], [0, 3]])
    torch.testing.assert_close(native.rows(ids), weight[ids], rtol=1e-6, atol=1e-6)
    some = torch.tensor([511, 0, 17])
    torch.testing.assert_close(native.matrices[0].decode_columns(some), weight.T[some], rtol=1e-6, atol=1e-6)
    g = torch.randn(2, 3, 40)
    torch.testing.assert_close(native.grad_input(g), g @ weight, rtol=1e-4, atol=1e-4)
    with pytest.raises(FewbitsError, match="a gradient of 39 columns"):
        native.grad_input(g[..., 1:])


def test_a_gradient_in_several_runs_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    q, native = prepared("Q6_K", 70)
    monkeypatch.setattr("fewbits.runtime.cpu.DECODED", 512 * 40)  # two tiles at a time
    g = torch.randn(3, 70)
    torch.testing.assert_close(native.grad_input(g), g @ q.dequantize(), rtol=1e-4, atol=1e-4)


def test_outlying_columns_of_int8_stay_in_floating_point() -> None:
    q, native = prepared("int8")
    x = torch.randn(6, 512).clamp(-5, 5)
    x[:, 40] = torch.tensor([6.0, 0.01, -900.0, 0.3, 7.5, 0.0])
    want = x.double() @ q.dequantize().double().T
    near = x.clone()
    near[:, 40] = 0
    kept = rounded(near) @ q.dequantize().double().T + x[:, 40:41].double() @ q.dequantize()[:, 40:41].double().T
    assert nmse(native.matmul(x, None), kept) < ROUNDED_ALIKE
    assert nmse(native.matmul(x, None), want) < 1e-6, "rounding 900 with its neighbours would lose them"


def test_a_stored_order_of_columns() -> None:
    q, _ = prepared("int4-g128")
    q = QTensor(q.codec, q.shape, q.planes, torch.randperm(512))
    native = Native(q, torch.float32)
    weight, x, g = q.dequantize(), torch.randn(5, 512), torch.randn(5, 40)
    assert nmse(native.matmul(x, None), x.double() @ weight.double().T) < PRODUCT
    torch.testing.assert_close(native.grad_input(g), g @ weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(native.rows(torch.tensor([7])), weight[7:8], rtol=1e-6, atol=1e-6)
    assert native.q.order is q.order


def stack(name: str, experts: int = 5) -> tuple[QTensor, Native]:
    torch.manual_seed(0)
    q = solve(torch.randn(experts, 24, 256), codecs.get(name))
    native = choose(q, CPU, "native").prepare(q, torch.float32)
    assert isinstance(native, Native)
    return q, native


@pytest.mark.parametrize("name", ["Q4_K", "int4-g128", "nf4", "int8"])
def test_experts(name: str, instructions: str) -> None:
    q, native = stack(name)
    weight = q.dequantize().double()
    for rows in (0, 1, 8, 70):
        x, experts = torch.randn(rows, 256), torch.randint(0, 4, (rows,))  # nothing for the last one
        if name == "int8" and rows:
            x[:, 3] = 50.0  # is left out of the rounding
        got = native.grouped(x, experts)
        assert got.shape == (rows, 24)
        assert not rows or nmse(got, torch.einsum("ni,noi->no", x.double(), weight[experts])) < PRODUCT
        for i in torch.unique(experts).tolist():  # the same bits as with each expert alone
            mine = experts == i
            assert torch.equal(got[mine], native._product(native.matrices[i], x[mine], None, None))
    assert all(torch.equal(native.q.planes[k], plane) for k, plane in q.planes.items())


def test_experts_with_orders_of_columns() -> None:
    q, _ = stack("int4-g128")
    x, experts = torch.randn(9, 256), torch.randint(0, 5, (9,))
    for order in (torch.randperm(256), torch.stack([torch.randperm(256) for _ in range(5)])):
        ordered = QTensor(q.codec, q.shape, q.planes, order)
        want = torch.einsum("ni,noi->no", x.double(), ordered.dequantize().double()[experts])
        assert nmse(Native(ordered, torch.float32).grouped(x, experts), want) < PRODUCT


def test_experts_that_are_none() -> None:
    _, native = stack("Q4_K")
    x = torch.randn(3, 256)
    for wrong in (5, -1):
        with pytest.raises(FewbitsError, match=f"expert {wrong} of 5"):
            native.grouped(x, torch.tensor([0, wrong, 4]))
    with pytest.raises(FewbitsError, match=r"experts \[2\] for \[3, 256\] activations"):
        native.grouped(x, torch.tensor([0, 1]))
    with pytest.raises(FewbitsError, match="activations of 255 columns"):
        native.grouped(x[:, 1:], torch.tensor([0, 1, 2]))
    with pytest.raises(FewbitsError, match="stack of 5"):
        native.matmul(x, None)
    with pytest.raises(FewbitsError, match="gradient"):
        native.grad_input(torch.randn(3, 24))
    weights, out = [m.weight for m in native.matrices], torch.full((3, 24), 7.0)
    for counts, rows in (([1, 1, 1, 1, -1], x), ([1, 1, 0, 0, 0], x), ([4, 0, 0, 0, 0], x), ([3, 0], x),
                         ([3, 0, 0, 0, 0], x[:, :32].contiguous())):
        with pytest.raises(ValueError):
            _native.grouped(weights, counts, rows, out, 1)
    with pytest.raises(ValueError, match="10000 threads"):
        _native.grouped(weights, [3, 0, 0, 0, 0], x, out, 10_000)
    assert bool((out == 7).all())


def test_weights_that_read_the_same_share_its_rounding(instructions: str) -> None:
    pairs = [prepared(name, rows) for name, rows in (("Q4_K", 40), ("Q6_K", 17), ("Q8_0", 1))]
    x = torch.randn(5, 512)
    outs = multiply([native.matrices[0] for _, native in pairs], x, [None] * 3)
    for (_, native), out in zip(pairs, outs, strict=True):
        assert torch.equal(out, native.matmul(x, None))


def test_every_number_of_threads_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, native = prepared("Q4_K", 200)
    x = torch.randn(50, 512)
    want = native.matmul(x, None)
    for count in (1, 2, 3, 8, 2):
        monkeypatch.setattr("fewbits.runtime.cpu.threads", lambda count=count: count)
        for _ in range(20):
            assert torch.equal(native.matmul(x, None), want)


def test_a_forked_child_computes_too() -> None:
    _, native = prepared("Q4_0", 200)
    x, out, back = torch.randn(1, 512), torch.empty(1, 200), torch.empty(1, 200)
    weight, acts = native.matrices[0].weight, _native.Rounded(x, 3)
    _native.multiply([weight], acts, [out], [None], 3)
    child = os.fork()
    if child == 0:
        _native.multiply([weight], acts, [back], [None], 3)
        os._exit(0 if torch.equal(out, back) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_bytes_in_memory() -> None:
    """Beside padding to 16 rows: sub-scales of 6 bits take a byte, TQ1_0's base 3 two bits, nested absmax a float."""
    known = {"TQ1_0": 1.23, "nf4-dq": 1.10, "int2-g64-asym": 1.05, "Q3_K": 1.04}
    for name in NAMES:
        q, native = prepared(name, 48)
        held = sum(plane.numel() for plane in native.matrices[0].planes.values())
        assert held <= q.nbytes * known.get(name, 1.03), name


@pytest.mark.parametrize("name, shape, reason", [
    ("kmeans4", (4, 64), "no native form of kmeans4"), ("fp8-e4m3", (4, 64), "no native form of fp8-e4m3"),
    ("nf4", (4, 96), "blocks of nf4 cross rows of 96 columns"), ("int4-g48", (4, 96), "groups of 48 columns"),
    ("int4-g32", (4, 0), "no matrix"), ("Q8_0", (64,), "no matrix")])
def test_reasons(name: str, shape: tuple[int, ...], reason: str) -> None:
    q = QTensor(codecs.get(name), shape, {})
    assert reason in (Cpu().supports(q, CPU) or "")
    assert Cpu().supports(q, torch.device("meta")) == "not on meta"


def test_bad_arguments_are_errors_before_any_work() -> None:
    _, native = prepared("Q4_0")
    weight, x = native.matrices[0].weight, torch.randn(2, 512)
    acts, out = _native.Rounded(x, 1), torch.full((2, 40), 7.0)
    for count in (0, -1, 257, 10_000):
        with pytest.raises(ValueError, match=f"{count} threads: 1 to 256"):
            _native.Rounded(x, count)
        with pytest.raises(ValueError, match=f"{count} threads"):
            _native.multiply([weight], acts, [out], [None], count)
    with pytest.raises(ValueError, match="96 columns, the weight 512"):
        _native.multiply([weight], _native.Rounded(torch.randn(2, 96), 1), [out], [None], 1)
    with pytest.raises(ValueError, match="the result's shape"):
        _native.multiply([weight], acts, [torch.empty(2, 39)], [None], 1)
    with pytest.raises(ValueError, match="the bias's shape"):
        _native.multiply([weight], acts, [out], [torch.empty(39)], 1)
    with pytest.raises(TypeError):
        _native.Rounded(x.double(), 1)
    with pytest.raises(TypeError):
        _native.multiply([weight], acts, [out.T], [None], 1)
    for bad in (-1, 40):
        with pytest.raises(ValueError, match=f"index {bad} is not in 0"):
            weight.rows(torch.tensor([bad]), torch.empty(1, 512), 1)
        with pytest.raises(FewbitsError, match="rows"):
            native.rows(torch.tensor([bad]))
    with pytest.raises(FewbitsError, match="activations of 96 columns, a weight of 512"):
        native.matmul(torch.randn(2, 96), None)
    assert bool((out == 7).all())


@pytest.mark.parametrize("change", [{"bits": 7}, {"bits": 0}, {"sub": 8}, {"group": 0}, {"scaling": "none"},
                                    {"scale": "f64"}, {"zero": 256}, {"rows": -1}, {"columns": 1 << 50}, {"rows": 41},
                                    {"mins": torch.zeros(8, dtype=torch.uint8)}, {"levels": [1], "values": [1.0]},
                                    {"scales": torch.zeros(8, dtype=torch.uint8)}, {"scaling": "small"}])
def test_planes_that_do_not_fit_are_errors(change: dict[str, object]) -> None:
    _, native = prepared("Q4_0", 48)
    planes = native.matrices[0].planes
    right: dict[str, object] = {
        "rows": 48, "columns": 512, "bits": 4, "zero": 8, "sub": 32, "group": 1, "factor": 1.0, "scaling": "plain",
        "scale": "f16", "values": [], "levels": [], "codes": planes["codes"], "scales": planes["scales"],
        "mins": None, "subscales": None, "submins": None}
    _native.Weight(**right)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        _native.Weight(**{**right, **({"rows": 49} if change == {"rows": 41} else change)})  # type: ignore[arg-type]
