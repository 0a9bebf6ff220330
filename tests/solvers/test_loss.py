"""The loss of a layer, against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from fewbits import codecs, solvers
from fewbits.calibration.statistics import Diagonal, Experts, Statistics
from fewbits.qtensor import QTensor


def naive(w: torch.Tensor, q: torch.Tensor, moment: torch.Tensor) -> float:
    w, q, moment = w.double(), q.double(), moment.double()
    return float(((w - q) @ moment @ (w - q).T).trace() / (w @ moment @ w.T).trace())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs(columns: int) -> torch.Tensor:
    return torch.randn(200, columns) * torch.rand(columns) + torch.randn(200, 1)


@pytest.mark.parametrize("chunk", [1 << 21, 300])
@pytest.mark.parametrize("codec", ["int3-g32", "Q4_0", "nf4-b64"])
def test_of_one_weight(codec: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of nf4 cross rows at width 96; with a chunk of 300 rows are taken three at a time."""
    monkeypatch.setattr(solvers, "CHUNK", chunk)
    w = torch.randn(20, 96)
    q = solvers.solve(w, codecs.get(codec))
    known = Statistics.zeros(96)
    known.add(inputs(96))
    assert solvers.loss(w, q, known) == pytest.approx(naive(w, q.dequantize(), known.moment), rel=1e-4)
    assert solvers.loss(w, q, None) == pytest.approx(naive(w, q.dequantize(), torch.eye(96)), rel=1e-4)
    diagonal = Diagonal(known.diagonal)
    assert solvers.loss(w, q, diagonal) == pytest.approx(naive(w, q.dequantize(), known.diagonal.diag()), rel=1e-4)


@pytest.mark.parametrize("codec", ["int3-g32", "nf4-b64"])
def test_of_experts(codec: str) -> None:
    """All experts together: the sum of what each changes, by the sum of what each puts out."""
    w = torch.randn(3, 10, 96)
    q = solvers.solve(w, codecs.get(codec))
    known = Experts(3, 96)
    known.add(inputs(96), None, (120, 80, 0))
    off = whole = 0.0
    for i, (part, decoded) in enumerate(zip(w.double(), q.dequantize().double(), strict=True)):
        moment = known.expert(i).moment.double()
        off += float(((part - decoded) @ moment @ (part - decoded).T).trace())
        whole += float((part @ moment @ part.T).trace())
    assert solvers.loss(w, q, known) == pytest.approx(off / whole, rel=1e-4)


def test_columns_in_an_order_of_their_own() -> None:
    w, order = torch.randn(8, 64), torch.randperm(64)
    plain = solvers.solve(w[:, order], codecs.get("Q8_0"))
    q = QTensor(plain.codec, plain.shape, plain.planes, order)
    assert solvers.loss(w, q, None) < 1e-4
