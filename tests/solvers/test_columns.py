"""Sweeps over columns: the native ones against those in torch, and those against the plainest loop in float64."""

from __future__ import annotations

import pytest
import torch

from fewbits import _native, codecs, instructions
from fewbits.codecs.base import Codec, Grid
from fewbits.solvers.columns import by_rounders, sweep

NAMES = ["int2-g128", "int3-g32-asym", "int4-row", "int8", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K",
         "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "nf4", "fp4", "MXFP4", "TQ2_0", "fp8-e4m3", "kmeans3"]


@pytest.fixture(params=_native.usable())
def instruction_set(request: pytest.FixtureRequest):
    before = _native.current()
    instructions.use(request.param)
    yield request.param
    instructions.use(before)


def problem(name: str, rows: int) -> tuple[Codec, torch.Tensor, Grid, torch.Tensor, torch.Tensor]:
    """Columns [unit, rows] in some order, the grid fitted to them, what they take over, their places."""
    codec = codecs.get(name)
    torch.manual_seed(rows)
    width = codec.unit(256)
    w = torch.randn(rows, width)
    w[:1] = 0  # a scale of nothing
    grid = codec.grid(codec.fit(w, None, {k: s[:, 0] for k, s in (codec.begin(w, None) or {}).items()} or None), width)
    order = torch.randperm(width)
    mix = torch.randn(width, width).triu(1) / width ** 0.5 + torch.eye(width)
    return codec, w.T[order].contiguous(), grid, mix, order


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("descends", [False, True])
def test_native_sweeps_are_those_in_torch(name: str, descends: bool, instruction_set: str) -> None:
    for rows in (1, 63, 130):
        _, x, grid, mix, position = problem(name, rows)
        old = grid.decode(grid.encode(x[position.argsort()].T.contiguous())).T[position] if descends else None
        want, wrong = by_rounders(x, grid, mix, position, old)
        values, errors = sweep(x, grid, mix, position, old)
        same = torch.isclose(values, want, rtol=1e-5, atol=1e-6).all(0)
        assert same.float().mean() > 0.9, "a tie that falls the other way changes what follows in its row"
        torch.testing.assert_close(errors[:, same], wrong[:, same], rtol=1e-4, atol=1e-4)


def test_sweeps_are_the_plain_loop() -> None:
    _, x, grid, mix, position = problem("Q4_K", 40)
    values, errors = sweep(x, grid, mix, position)
    work, want, wrong = x.double(), torch.empty_like(x).double(), torch.empty_like(x).double()
    for j in range(len(x)):
        one = grid.columns(slice(int(position[j]), int(position[j]) + 1))
        want[j] = one.decode(one.encode(work[j].float()[:, None]))[:, 0]
        wrong[j] = work[j] - want[j]
        work[j + 1:] -= mix[j, j + 1:, None].double() * wrong[j]
    same = torch.isclose(values.double(), want, rtol=1e-5, atol=1e-5).all(0)
    assert same.float().mean() > 0.9, "but for ties"
    torch.testing.assert_close(errors[:, same].double(), wrong[:, same], rtol=1e-3, atol=1e-4)


def test_arguments_are_checked() -> None:
    _, x, grid, mix, position = problem("int4-g32", 4)
    with pytest.raises(ValueError, match="mix: not 32 x 32"):
        sweep(x, grid, mix[:3], position)
    with pytest.raises(ValueError, match="position: not a column"):
        sweep(x, grid, mix, position + 1)
