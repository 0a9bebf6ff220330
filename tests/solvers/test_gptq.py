"""GPTQ against a float64 version that follows the paper's definition, and its inequality against rounding."""

from __future__ import annotations

import pytest
import torch

from fewbits import codecs
from fewbits.calibrate import Statistics
from fewbits.codecs.base import decode_units
from fewbits.errors import FewbitsError
from fewbits.solvers import solve
from fewbits.solvers.gptq import gptq, inverse_factor, refuses, unit_order

CODECS = ["int4-g128", "int4-g32-asym", "int3-g32", "int2-g16-asym", "int8-g64", "int4-row", "int8", "nf4", "fp4-b32",
          "nf4-dq", "Q8_0", "Q4_0", "Q5_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
          "TQ2_0", "Q1_0"]


def correlated(rows: int, columns: int, tokens: int = 600, seed: int = 0) -> tuple[torch.Tensor, Statistics]:
    """A weight, and statistics of inputs whose columns depend on each other and differ in size."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(torch.randn(columns, generator=draw))
    statistics = Statistics.zeros(columns)
    statistics.add(torch.randn(tokens, columns, generator=draw) @ mix * sizes)
    return torch.randn(rows, columns, generator=draw), statistics


def naive(w: torch.Tensor, codec, statistics: Statistics) -> torch.Tensor:
    """Column by column with the inverse of what is left of H, recomputed from its definition; values in float64."""
    columns = w.shape[1]
    moment = statistics.moment.double()
    diagonal = moment.diagonal().clone()
    moment = moment + 0.01 * diagonal.mean() * torch.eye(columns, dtype=torch.float64)
    order = unit_order(diagonal, codec.unit(columns))
    work, done, left = w.double().clone(), torch.empty_like(w, dtype=torch.float64), [int(c) for u in order for c in u]
    state = codec.begin(w, None)
    for unit in order:
        natural = unit.sort().values
        known = None if state is None else {k: s[:, int(natural[0]) // codec.unit(columns)] for k, s in state.items()}
        params = codec.fit(work[:, natural], diagonal[natural], known)
        grid = codec.grid(params, len(unit))
        for column in (int(c) for c in unit):
            at = int((natural == column).nonzero())
            only = grid.columns(slice(at, at + 1))
            done[:, column] = only.decode(only.encode(work[:, column:column + 1]))[:, 0].double()
            inverse = torch.linalg.inv(moment[left][:, left])
            here = left.index(column)
            error = (work[:, column] - done[:, column]) / inverse[here, here]
            work[:, left] -= error[:, None] * inverse[here]
            left.remove(column)
    return done


@pytest.mark.parametrize("name", CODECS)
def test_equals_naive_float64(name: str) -> None:
    codec = codecs.get(name)
    w, statistics = correlated(3, 256 if codec.unit(256) == 256 and codec.family == "ggml" else 128)
    codes, params = gptq(w.double(), codec, statistics, codec.begin(w, None))
    # a scale may round to the neighbouring half-precision number; another code would be a hundredth at least
    got = decode_units(codes, codec, params).double()
    torch.testing.assert_close(got, naive(w, codec, statistics), rtol=0, atol=4e-3)


@pytest.mark.parametrize("name", CODECS)
def test_beats_nearest_where_it_counts(name: str) -> None:
    """tr((W - Q) H (W - Q)^T) is lower than that of rounding and of the weighted search."""
    codec = codecs.get(name)
    w, statistics = correlated(16, 512, seed=1)

    def loss(solver: str) -> float:
        off = (w - solve(w, codec, solver, statistics).dequantize()).double()
        return float(torch.trace(off @ statistics.moment.double() @ off.T))

    assert loss("gptq") < 0.9 * loss("nearest")
    assert loss("gptq") < loss("search")


def test_ragged_last_group() -> None:
    codec = codecs.get("int4-g32-asym")
    w, statistics = correlated(8, 172)
    q = solve(w, codec, "gptq", statistics)
    assert q.shape == (8, 172)
    torch.testing.assert_close(q.dequantize().double(), naive(w, codec, statistics), rtol=0, atol=4e-3)


def test_dead_inputs_and_one_token() -> None:
    """A moment of rank one with dead inputs is solved, not failed."""
    w, _ = correlated(4, 64)
    statistics = Statistics.zeros(64)
    x = torch.zeros(1, 64)
    x[0, ::2] = 1.0
    statistics.add(x)
    assert solve(w, codecs.get("int4-g32"), "gptq", statistics).dequantize().isfinite().all()


def test_inverse_factor_is_the_factor_of_the_inverse() -> None:
    _, statistics = correlated(1, 40)
    damped = statistics.moment + 0.01 * statistics.moment.diagonal().mean() * torch.eye(40)
    upper = inverse_factor(statistics.moment)
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped), rtol=1e-3, atol=1e-4)


def test_indefinite_moment_is_named() -> None:
    with pytest.raises(FewbitsError, match="not positive definite"):
        inverse_factor(torch.tensor([[1.0, 9.0], [9.0, 1.0]]))


def test_blocks_across_rows_are_refused() -> None:
    assert "cross rows" in (refuses(codecs.get("nf4"), (8, 172)) or "")
    with pytest.raises(FewbitsError, match="cross rows"):
        solve(torch.randn(8, 172), codecs.get("nf4"), "gptq", Statistics.zeros(172))


def test_statistics_of_another_width_are_refused() -> None:
    with pytest.raises(FewbitsError, match="statistics of 32 inputs"):
        solve(torch.randn(4, 64), codecs.get("int4-g32"), "gptq", Statistics.zeros(32))
