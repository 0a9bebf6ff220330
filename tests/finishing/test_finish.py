"""Finishing as a part of quantizing: nearer to the original, the same codes, resumable, in every container."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fewbits
from fewbits import containers, finishing, solvers
from fewbits.errors import FewbitsError

OPTIONS: dict[str, Any] = {"samples": 16, "length": 64}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(finishing.STEPS, "quick", 24)


def quantize(tiny: Path, out: Path, english: Path, recipe: str = "int2-g32", **more: Any) -> fewbits.Result:
    return fewbits.quantize(tiny, out, recipe, calibration=english, **{**OPTIONS, "finish": "quick", **more})


def divergence(out: Path, tiny: Path, english: Path) -> float:
    found = fewbits.evaluate(out, tiny, text=english, chunks=4, context=64).kl_mean
    assert found is not None
    return found


@pytest.mark.parametrize(("recipe", "name"), [("int2-g32", "a"), ("Q4_0", "a.gguf"), ("nf4-b32", "a")])
@pytest.mark.parametrize("whole", [True, False])
def test_nearer_to_the_original(recipe: str, name: str, whole: bool, tiny: Path, english: Path, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finishing, "BYTES", finishing.BYTES if whole else 10 ** 12)
    (tmp_path / "plain").mkdir()
    plain = quantize(tiny, tmp_path / "plain" / name, english, recipe, finish="off").path
    result = quantize(tiny, tmp_path / name, english, recipe)
    assert any(n.startswith("finished (quick, 24 steps" + ("" if whole else " a block")) for n in result.notes)
    assert divergence(result.path, tiny, english) < divergence(plain, tiny, english)
    before, after = containers.open(plain), containers.open(result.path)
    moved = 0
    for n, entry in after.entries.items():
        assert entry.codec == before.entries[n].codec
        if entry.codec.linear:
            assert torch.equal(entry.load().unpack()[0], before.entries[n].load().unpack()[0]), n
            moved += not torch.equal(entry.load().dequantize(), before.entries[n].load().dequantize())
    assert moved > 3


@pytest.mark.parametrize("whole", [True, False])
def test_a_killed_run_goes_on_to_the_same_bytes(whole: bool, tiny: Path, english: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finishing, "BYTES", finishing.BYTES if whole else 10 ** 12)
    monkeypatch.setattr(finishing.training, "SAVE_EVERY", 0.0)
    unbroken = quantize(tiny, tmp_path / "a", english).path

    class Killed(Exception):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if what.startswith("finishing") and done > total // 2:
            raise Killed

    with pytest.raises(Killed):
        quantize(tiny, tmp_path / "b", english, progress=kill)
    began: list[int] = []
    monkeypatch.setattr(finishing, "BYTES", 10 ** 12 if whole else 1)  # other memory is free now

    def watch(what: str, done: int, total: int) -> None:
        if what.startswith("finishing"):
            began.append(done)

    resumed = quantize(tiny, tmp_path / "b", english, progress=watch).path
    assert min(began) >= (24 // 2 if whole else 0) and len(began) < 24 * (1 if whole else 8)
    assert (resumed / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


def test_another_level_takes_what_is_solved(tiny: Path, english: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if what.startswith("finishing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny, tmp_path / "a", english, progress=kill)
    monkeypatch.setattr(solvers, "solve_together", None)
    again = quantize(tiny, tmp_path / "a", english, finish="off").path
    monkeypatch.undo()
    assert (again / "model.safetensors").read_bytes() == (
        quantize(tiny, tmp_path / "b", english, finish="off").path / "model.safetensors").read_bytes()


def test_never_worse_on_held_out_text(tiny: Path, english: Path, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps far too large, everything stays as it was."""
    plain = quantize(tiny, tmp_path / "a", english, finish="off").path
    monkeypatch.setattr(finishing, "RATE", 1e5)
    wild = quantize(tiny, tmp_path / "b", english).path
    assert (wild / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def test_without_text_the_models_own_is_taken(tiny: Path, tmp_path: Path) -> None:
    result = fewbits.quantize(tiny, tmp_path / "a", "nf4", finish="quick", **OPTIONS)
    assert result.calibration is not None and result.calibration.startswith("self")


def test_bad_levels_and_too_little_text(tiny: Path, english: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="--finish slow: no such level"):
        quantize(tiny, tmp_path / "a", english, finish="slow")
    with pytest.raises(FewbitsError, match="cannot be held out"):
        fewbits.quantize(tiny, tmp_path / "a", "int4-g32", calibration=[{"input_ids": torch.arange(64)[None]}],
                         finish="quick")


# files that are there already -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["a.gguf", "a"])
def test_a_file_is_finished_as_it_would_have_been(name: str, tiny: Path, english: Path, tmp_path: Path) -> None:
    recipe = "Q4_0" if name.endswith("gguf") else "int3-g32"
    at_once = quantize(tiny, tmp_path / ("once-" + name), english, recipe).path
    plain = quantize(tiny, tmp_path / ("plain-" + name), english, recipe, finish="off").path
    found = fewbits.finish(plain, tmp_path / ("later-" + name), tiny, calibration=english, length=OPTIONS["length"])
    assert found.notes[-1].startswith("finished (quick")
    for n, entry in containers.open(found.path).entries.items():
        assert torch.equal(entry.load().dequantize(), containers.open(at_once).entries[n].load().dequantize()), n


def test_files_that_cannot_be_finished(tiny: Path, english: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="nothing in it can be tuned: F16, F32"):
        plain = fewbits.quantize(tiny, tmp_path / "f16.gguf", "f16", container="gguf").path
        fewbits.finish(plain, tmp_path / "out", tiny, calibration=english, **OPTIONS)
    other = tmp_path / "other"
    shape = transformers.AutoConfig.from_pretrained(tiny)
    shape.intermediate_size = 96
    transformers.LlamaForCausalLM(shape).save_pretrained(other)
    plain = quantize(tiny, tmp_path / "a", english, finish="off").path
    with pytest.raises(FewbitsError, match=r"is no quantization of .*mlp.*there: \[96, 96\], not \[96, 172\]"):
        fewbits.finish(plain, tmp_path / "b", other, calibration=english, **OPTIONS)
