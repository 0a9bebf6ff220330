"""Quantizing on a GPU: walks, statistics and solvers there, the file from here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbits
from fewbits import containers
from fewbits.calibration.walk import Walk
from fewbits.errors import FewbitsError
from fewbits.jobs.job import Job
from tests import devices

sys.path.insert(0, str(Path(__file__).parents[1] / "arch"))
from models import MODELS, directory  # type: ignore[import-not-found]  # noqa: E402
from models import tiny as small  # type: ignore[import-not-found]  # noqa: E402

OPTIONS: dict[str, Any] = {"samples": 2, "length": 32}


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Kinds of device that weights were solved on."""
    found: set[str] = set()
    real = Job._weight

    def weight(self: Job, name: str) -> torch.Tensor:
        loaded = real(self, name)
        found.add(loaded.device.type)
        return loaded

    monkeypatch.setattr(Job, "_weight", weight)
    return found


@pytest.mark.parametrize("recipe", ["int3-g32", "w8a8-static"])
def test_calibrated_as_well_as_on_the_cpu(recipe: str, tiny: Path, tmp_path: Path, english: Path,
                                          places: set[str]) -> None:
    with devices.found():
        there = fewbits.quantize(tiny, tmp_path / "there", recipe, calibration=english, **OPTIONS)
    assert places == {"cuda"}, "by default on the GPU"
    here = fewbits.quantize(tiny, tmp_path / "here", recipe, calibration=english, device="cpu", **OPTIONS)
    assert there.error and here.error and there.error[0] == pytest.approx(here.error[0], rel=0.05)
    for entry in containers.open(tmp_path / "there").entries.values():
        assert entry.load().device.type == "cpu"


def test_searched_as_well_as_on_the_cpu(tiny: Path, tmp_path: Path, places: set[str]) -> None:
    with devices.found():
        there = fewbits.quantize(tiny, tmp_path / "there.gguf", "Q8_0", device="cuda")
    here = fewbits.quantize(tiny, tmp_path / "here.gguf", "Q8_0", device="cpu")
    assert places == {"cpu", "cuda"}
    assert there.error and here.error and there.error[0] == pytest.approx(here.error[0], rel=0.01)


@pytest.mark.parametrize("drift", [False, True])
def test_statistics_of_experts(drift: bool, tmp_path: Path) -> None:
    source = containers.open(directory(small(MODELS["qwen3_moe"]), tmp_path / "m"))
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 320, (1, 12)),
                "attention_mask": torch.tensor([[0] * missing + [1] * (12 - missing)])} for missing in (0, 3)]

    def moments(device: torch.device | None) -> dict[str, torch.Tensor]:
        found = {}
        for name, known in next(iter(Walk(source, batches, drift, device=device))).statistics().items():
            parts = getattr(known, "parts", [known])
            assert all(p.moment.device == (device or torch.device("cpu")) for p in parts)
            found[name] = torch.stack([p.moment.cpu() for p in parts])
        return found

    with devices.found() as device:
        there = moments(device)
    here = moments(None)
    assert there.keys() == here.keys() and any(len(m) > 1 or ".experts." in n for n, m in here.items())
    for name, moment in here.items():
        torch.testing.assert_close(there[name], moment)


def test_too_little_memory(tiny: Path, tmp_path: Path, english: Path, places: set[str]) -> None:
    with devices.found(free=100_000):
        with pytest.raises(FewbitsError, match=r"needs about 0.00 GB of memory, 0.00 GB are free on cuda:0") as error:
            fewbits.quantize(tiny, tmp_path / "out", "int4-g32", calibration=english, device="cuda", **OPTIONS)
        assert "--device cpu" in (error.value.hint or "")
        result = fewbits.quantize(tiny, tmp_path / "out", "int4-g32", calibration=english, **OPTIONS)
    assert places == {"cpu"}
    assert any(n.startswith("quantized on the CPU: block 0 with 64 calibration tokens") for n in result.notes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_before_anything_is_done(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(FewbitsError, match="no GPU"):
        fewbits.quantize(tiny, tmp_path / "out", "int8", device="cuda")
    assert not list(tmp_path.iterdir())
