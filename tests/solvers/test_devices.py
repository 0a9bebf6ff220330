"""GPTQ on a GPU: no tensor strays to the CPU, and it loses no more than on the CPU."""

from __future__ import annotations

import pytest
import torch

from fewbits import codecs, solvers
from fewbits.calibration.statistics import Experts, Statistics
from tests import devices

CODECS = ["int4-g32", "int3-g32-asym", "int4-row", "nf4", "nf4-b32-dq", "Q4_K", "Q6_K", "IQ4_XS", "kmeans3", "fp8-e4m3",
          "fp8-e4m3-b48", "w8a8-asym"]


def statistics(width: int, drift: bool = True) -> Statistics:
    torch.manual_seed(1)
    found = Statistics.zeros(width, drift)
    mixed = torch.randn(300, width) @ torch.randn(width, width)
    found.add(mixed, mixed + torch.randn(300, width))
    return found


def on(device: torch.device, known: Statistics) -> Statistics:
    drift, peak = known.drift, known.peak
    return Statistics(known.moment.to(device), known.count, None if drift is None else drift.to(device),
                      None if peak is None else peak.to(device))


@pytest.mark.parametrize("solver", ["gptq", "gptq-act-order"])
@pytest.mark.parametrize("name", CODECS)
def test_gptq(name: str, solver: str) -> None:
    codec = codecs.get(name)
    w = torch.randn(5, 256 if codec.family == "ggml" else 96, generator=torch.Generator().manual_seed(0))
    if solvers.refuses(solver, codec, tuple(w.shape)):
        pytest.skip("blocks cross rows")
    known = statistics(w.shape[1])
    with devices.gpu() as device:
        there = on(device, known)
        q = solvers.solve(w.to(device), codec, solver, there)
        assert {p.device for p in q.planes.values()} == {device}
        loss = solvers.loss(w.to(device), q, there)
    here = solvers.loss(w, solvers.solve(w, codec, solver, known), known)
    assert loss <= 1.1 * here, "rounding differs in ties, from which other codes follow"


def test_stacks_of_experts() -> None:
    codec = codecs.get("int4-g32")
    w = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(90, 64, generator=torch.Generator().manual_seed(1))
    with devices.gpu() as device:
        known = Experts(3, 64, device=device)
        known.add(x.to(device), counts=(60, 0, 30))
        q = solvers.solve(w.to(device), codec, "gptq", known)
        assert {p.device for p in q.planes.values()} == {device}
        loss = solvers.loss(w.to(device), q, known)
    here = Experts(3, 64)
    here.add(x, counts=(60, 0, 30))
    assert loss <= 1.1 * solvers.loss(w, solvers.solve(w, codec, "gptq", here), here)
