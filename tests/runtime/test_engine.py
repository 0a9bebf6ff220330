"""Where a decoder computes: the CPU, a GPU that is named, or one that is there and has room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewbits
from fewbits import containers
from fewbits.errors import FewbitsError, NotHere
from fewbits.generate import Session
from fewbits.measure.scoring import Decoded, scorer
from fewbits.runtime import decoder, engine

LARGE = 1 << 40


def room(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits import devices

    monkeypatch.setattr(devices, "free_bytes", lambda where: nbytes)


def test_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "GPUS", (str(tmp_path / "no"),))
    assert [engine.device(name) for name in (None, "cpu", "auto")] == [None] * 3
    with pytest.raises(FewbitsError, match="unknown device 'gpu'"):
        engine.device("gpu")
    monkeypatch.setattr(engine, "GPUS", (str(tmp_path),))
    from fewbits import devices

    for found, want in (("cuda:1", torch.device("cuda", 1)), ("cpu", None)):
        monkeypatch.setattr(devices, "find", lambda name, found=found: torch.device(found))
        assert engine.device("auto") == want


def test_a_gpu_without_triton(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.runtime.triton import available

    monkeypatch.setattr(available, "unavailable", lambda where: "triton is not installed")
    with pytest.raises(NotHere, match="no decoder on cuda:1: triton is not installed"):
        decoder.compile(containers.open(tiny), torch.device("cuda", 1))


def test_texts(tiny: Path, gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    room(LARGE, monkeypatch)
    ids = [5, 6, 7]
    want = Session(tiny, device="cpu").generate(ids, max_tokens=4).tokens
    session = Session(tiny, device="cuda")
    assert session.generate(ids, max_tokens=4, lookup=True).tokens == want
    assert session.generate([*ids, *want[:1]], max_tokens=3).tokens == want[1:]
    assert Session(tiny).model.engine.name.startswith("decoder on ")
    assert Session(tiny, cache="q8_0").model.engine.name == "native decoder", "which has such caches"
    with pytest.raises(FewbitsError, match="a cache in q8_0 is not on the GPU yet"):
        Session(tiny, cache="q8_0", device="cuda")
    assert capsys.readouterr().err == ""


def test_a_gpu_without_room(tiny: Path, gpu: None, monkeypatch: pytest.MonkeyPatch,
                            capsys: pytest.CaptureFixture[str]) -> None:
    free = (1 << 29) + 1000
    room(free, monkeypatch)
    message = f"{tiny}: takes 0.5 GB on .*, {free / 1e9:.1f} GB are free"
    with pytest.raises(NotHere, match=message) as caught:
        Session(tiny, device="cuda")
    assert caught.value.hint == "--device cpu", "nothing fits"
    assert Session(tiny).model.engine.name == "native decoder"
    error = capsys.readouterr().err
    assert error.startswith("note: ") and error.endswith("GB are free; the CPU computes\n") and error.count("\n") == 1


def test_what_a_gpu_does_not_know(tiny: Path, gpu: None, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    room(LARGE, monkeypatch)
    checkpoint = containers.open(tiny)
    checkpoint.config["hidden_act"] = "tanh"
    asked, loaded = list[object](), fewbits.load(tiny)
    monkeypatch.setattr("fewbits.loading.load", lambda checkpoint, **how: asked.append(how) or loaded)
    for device in ("cuda", "auto"):
        assert not Session(checkpoint, device=device).native
    assert asked == [{"kernel": None, "device": torch.device("cuda")}] * 2
    assert capsys.readouterr().err.splitlines() == [
        f"note: {tiny}: no native decoder for hidden_act 'tanh'; Transformers computes"] * 2


def test_measuring(tiny: Path, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    room(LARGE, monkeypatch)
    found = scorer(tiny, device="cuda")
    assert isinstance(found, Decoded) and found.kernel.startswith("decoder on ")
    window, pieces = torch.arange(9), [slice(0, 5), slice(5, 9)]
    for got, want in zip(found.logits(window, pieces), scorer(tiny).logits(window, pieces), strict=True):
        assert ((got - want) ** 2).sum() <= 1e-6 * (want ** 2).sum()
