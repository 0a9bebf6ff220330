"""Every codec on a GPU: no tensor strays to the CPU; what is found there is as good, and decodes to the same bits."""

from __future__ import annotations

import pytest
import torch

from fewbits import codecs, solvers
from fewbits.calibration.statistics import Diagonal
from fewbits.qtensor import QTensor
from tests import devices
from tests.codecs import registry

CPU = torch.device("cpu")
WORSE = 1.03  # the reference's error over the native search's: up to 1.022, of six rows


def decoded(q: QTensor) -> torch.Tensor:
    """What `q` decodes to, on its device and, bit by bit the same, on the CPU."""
    found, here = q.dequantize(), q.to(CPU).dequantize()
    assert torch.equal(found.cpu(), here)
    return found


@pytest.mark.parametrize("solver", ["nearest", "search"])
@pytest.mark.parametrize("name", registry.ALL)
def test_solved_on_the_gpu(name: str, solver: str) -> None:
    codec = registry.get(name)
    w = registry.weights(codec)
    known = Diagonal(registry.importances(w.shape[-1])) if solver == "search" else None
    with devices.gpu() as device:
        there = None if known is None else known.to(device)
        q = solvers.solve(w.to(device), codec, solver, there)
        codes, params = q.unpack()
        assert {t.device for t in (*q.planes.values(), *params.values(), codes, decoded(q))} == {device}
        again = QTensor.pack(codec, q.shape, codes, params)
        assert all(torch.equal(again.planes[k], p) for k, p in q.planes.items())
        loss = solvers.loss(w.to(device), q, there)
    here = solvers.loss(w, solvers.solve(w, codec, solver, known), known)
    assert loss == pytest.approx(solvers.loss(w, q.to(CPU), known), rel=1e-4)
    assert loss <= WORSE * here


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ3_S"])
def test_types_that_are_only_decoded(name: str) -> None:
    codec = codecs.get(name)
    (kind, shape), = codec.planes((4, 256)).values()
    blocks = torch.randint(0, 100, shape, dtype=getattr(torch, kind), generator=torch.Generator().manual_seed(0))
    with devices.gpu() as device:
        q = QTensor(codec, (4, 256), {"blocks": blocks.to(device)})
        assert decoded(q).device == device
