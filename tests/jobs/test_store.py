"""Solved tensors on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewbits import codecs, solvers
from fewbits.jobs.store import Store
from fewbits.qtensor import QTensor


@pytest.mark.parametrize("codec", ["int4-g32", "Q4_K", "nf4-dq", "fp8-e4m3", "kmeans3"])
@pytest.mark.parametrize("ordered", [False, True])
def test_a_tensor_comes_back_as_it_was(codec: str, ordered: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    q = solvers.solve(torch.randn(8, 256), codecs.get(codec))
    order = torch.randperm(256) if ordered else None
    q = QTensor(q.codec, q.shape, q.planes, order)
    store = Store(tmp_path / "work", {"job": 1})
    store.put("a.weight", q, {"solver": "search", "error": 0.1})
    again = Store(tmp_path / "work", {"job": 1})
    assert again.has("a.weight") and not again.has("b.weight")
    got = again.get("a.weight", q.codec, q.shape)
    assert got.planes.keys() == q.planes.keys() and all(torch.equal(got.planes[k], p) for k, p in q.planes.items())
    assert got.order is None if order is None else torch.equal(got.order, order)
    assert again.record("a.weight") == {"solver": "search", "error": 0.1}


def test_another_job_begins_anew(tmp_path: Path) -> None:
    q = solvers.solve(torch.ones(2, 32), codecs.get("Q8_0"))
    Store(tmp_path / "work", {"job": 1}).put("a", q, {})
    assert not Store(tmp_path / "work", {"job": 2}).has("a")


def test_half_a_file_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q = solvers.solve(torch.ones(2, 32), codecs.get("Q8_0"))
    store = Store(tmp_path / "work", {"job": 1})

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fewbits.jobs.store.sync", dies)
    with pytest.raises(KeyboardInterrupt):
        store.put("a", q, {})
    assert list((tmp_path / "work").glob("*.partial")) and not Store(tmp_path / "work", {"job": 1}).has("a")
