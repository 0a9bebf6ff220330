"""Search never loses to nearest; packing in chunks changes nothing."""

from __future__ import annotations

import pytest
import torch

from fewbits import codecs, solvers
from fewbits.calibration.walk import Statistics
from fewbits.errors import FewbitsError
from fewbits.solvers import solve

CODECS = ["int4-g128", "int3-g32-asym", "int8", "nf4", "nf4-dq", "fp4", "Q8_0", "Q4_0", "Q5_0", "Q2_K", "Q3_K", "Q4_K",
          "Q6_K"]


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(48, 512, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CODECS)
def test_search_with_importance_has_the_lower_weighted_error(name: str, weight: torch.Tensor) -> None:
    importance = torch.exp(2 * torch.randn(512, generator=torch.Generator().manual_seed(1)))
    statistics = Statistics(torch.diag(importance), 1)

    def error(solver: str, given: Statistics | None) -> float:
        got = solve(weight, codecs.get(name), solver, given).dequantize()
        return float(((weight - got).square() * importance).sum())

    assert error("search", statistics) <= error("nearest", None)


@pytest.mark.parametrize("name", CODECS)
def test_search_never_loses_to_nearest(name: str, weight: torch.Tensor) -> None:
    def error(solver: str) -> float:
        return float((weight - solve(weight, codecs.get(name), solver).dequantize()).square().sum())

    assert error("search") <= error("nearest") * (1 + 1e-6)


@pytest.mark.parametrize("name", ["Q4_0", "int4-g128", "nf4"])
def test_chunks_do_not_matter(name: str, weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = solve(weight, codecs.get(name))
    monkeypatch.setattr(solvers, "PART", 3 * 512)
    parts = solve(weight, codecs.get(name))
    assert not torch.equal(whole.dequantize(), torch.zeros_like(weight))
    # sums run in another order: a scale may round to its neighbour, no more
    torch.testing.assert_close(parts.dequantize(), whole.dequantize(), rtol=2e-3, atol=2e-3)


def test_half_precision_source_equals_float32(weight: torch.Tensor) -> None:
    half = weight.half()
    a, b = solve(half, codecs.get("Q8_0")), solve(half.float(), codecs.get("Q8_0"))
    assert torch.equal(a.planes["blocks"], b.planes["blocks"])


def test_unknown_solver_and_missing_statistics(weight: torch.Tensor) -> None:
    with pytest.raises(FewbitsError, match="unknown solver 'magic'"):
        solve(weight, codecs.get("Q8_0"), "magic")
    with pytest.raises(FewbitsError, match="needs calibration text"):
        solve(weight, codecs.get("Q8_0"), "gptq")
