"""Codebooks against exact clustering by brute force, and numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits import codecs
from fewbits.calibration.walk import Statistics
from fewbits.codecs.base import decode_units, encode_units, fit_units
from fewbits.codecs.codebook import CUTS, Sums, cuts
from fewbits.qtensor import QTensor
from fewbits.solvers import solve


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02
    w[:, 3] *= 9
    return w


def test_kmeans2_by_hand():
    """Codes 3, 0, 1, 2, the first in the lowest bits: 10 01 00 11 is byte 93; then code 3 alone: 03."""
    levels = torch.tensor([[-1.0, 0.5, 2.0, -8.0]]).half()
    planes = {"codes": torch.tensor([[0b10010011, 0b11]], dtype=torch.uint8), "levels": levels}
    q = QTensor(codecs.get("kmeans2"), (1, 5), planes)
    assert q.dequantize().tolist() == [[-8.0, -1.0, 0.5, 2.0, -8.0]]
    grid = q.codec.grid({"levels": levels}, 5)
    assert grid.encode(torch.tensor([[-9.0, -4.4, 1.2, 1.3, 9.0]])).tolist() == [[3, 0, 1, 2, 2]]  # levels in any order


def exact(x: list[float], weight: list[float], k: int) -> float:
    """The least weighted squared error of k clusters, by dynamic programming over all places, in Python's floats."""
    order = sorted(range(len(x)), key=lambda i: x[i])
    x, weight = [x[i] for i in order], [weight[i] for i in order]
    n = len(x)
    cost = [[0.0] * (n + 1) for _ in range(n + 1)]
    for i in range(n):
        mass = mean = error = 0.0
        for j in range(i, n):  # Welford's update
            mass += weight[j]
            step = x[j] - mean
            mean += weight[j] / mass * step
            error += weight[j] * step * (x[j] - mean)
            cost[i][j + 1] = error
    best = cost[0]
    for _ in range(k - 1):
        best = [min(best[i] + cost[i][j] for i in range(j + 1)) for j in range(n + 1)]
    return best[n]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [40, 200])
def test_clusters_are_nearly_the_best(bits, columns, weighted):
    codec, w = codecs.get(f"kmeans{bits}"), random(4, columns)
    importance = torch.rand(columns, generator=torch.Generator().manual_seed(1)) + 0.01 if weighted else None
    params = fit_units(w, codec, importance, None)
    squared = (decode_units(encode_units(w, codec, params), codec, params) - w).double().square()
    weight = torch.ones(columns) if importance is None else importance
    for row, errors in zip(w, squared, strict=True):
        best = exact(row.tolist(), weight.tolist(), 1 << bits)
        got = float((errors * weight).sum())
        most = 1.002 if columns <= CUTS else 1.05  # measured up to 1.0001 and 1.034
        assert best * (1 - 1e-6) <= got <= best * most, got / best


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [17, 500, 3000])
def test_few_distinct_values_are_kept(bits, columns):
    """However far apart they lie, and however rare they are."""
    generator = torch.Generator().manual_seed(columns)
    sizes = 10.0 ** torch.randint(-4, 2, (1 << bits,), generator=generator)
    values = (torch.randn(1 << bits, generator=generator) * sizes).half().float()
    index = torch.randint(0, 1 << bits, (6, columns), generator=generator)
    index[0, 1:] = 0  # one value but for a single weight
    w = values[index]
    got = solve(w, codecs.get(f"kmeans{bits}")).dequantize()
    # the error of ever so small a value beside a large one vanishes beside float64's rounding of the sums
    assert torch.allclose(got, w, rtol=0, atol=1e-6 * float(w.abs().max()))


def test_places_for_clusters_to_end():
    x = torch.tensor([[1.0] * 50 + [2.0] * 100 + [2.001] * 50, list(range(200))]).double()
    places = cuts(Sums.of(x, torch.ones_like(x)))
    assert places.shape == (2, CUTS + 1)
    assert set(places[0].tolist()) == {0, 50, 150, 200}
    assert (places[1].diff() >= 3).all() and (places[1].diff() <= 4).all()


def test_levels_beyond_float16_saturate():
    got = solve(random(2, 64) * 1e9, codecs.get("kmeans4")).planes["levels"]
    assert got.isfinite().all() and got.abs().max() == 65504


@given(st.sampled_from(["kmeans4", "kmeans3", "kmeans2"]), st.integers(1, 20), st.integers(1, 40))
def test_any_shape_there_and_back(name, rows, columns):
    codec = codecs.get(name)
    generator = torch.Generator().manual_seed(rows * columns)
    codes = torch.randint(0, 1 << codec.bits, (rows, columns), dtype=torch.uint8, generator=generator)
    levels = torch.randn(rows, 1, 1 << codec.bits, generator=generator).half()
    planes = codec.pack(codes, {"levels": levels}, (rows, columns))
    announced = codec.planes((rows, columns))
    assert {k: tuple(p.shape) for k, p in planes.items()} == {k: shape for k, (_, shape) in announced.items()}
    again, params = codec.unpack(planes, (rows, columns))
    assert torch.equal(again, codes) and torch.equal(params["levels"], levels)


def test_experts():
    w = random(24, 48).view(2, 12, 48)
    q = solve(w, codecs.get("kmeans4"))
    assert q.planes["levels"].shape == (24, 16)
    assert (q.dequantize() - w).square().sum() < 0.01 * w.square().sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq(bits):
    """Less error on the layer's outputs than search, on correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    w = random(80, 96)
    moment = x.T @ x / len(x)
    errors = []
    for solver in ("search", "gptq"):
        d = solve(w, codecs.get(f"kmeans{bits}"), solver, Statistics(moment, len(x))).dequantize() - w
        errors.append(float(torch.einsum("ij,jk,ik->", d, moment, d)))
    assert errors[1] < 0.8 * errors[0]
