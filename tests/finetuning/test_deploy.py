"""From a model and data to a file: what is left, what it was made of, and every step of a killed call gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewbits import containers
from fewbits.errors import FewbitsError
from fewbits.finetuning import deploy as module
from fewbits.finetuning.adapters import Lora
from fewbits.finetuning.data import Data, Example
from fewbits.finetuning.deploy import deploy, windows
from fewbits.finetuning.loop import Settings
from fewbits.quantizing import quantize
from tests.cli.conftest import Run
from tests.cli.conftest import fewbits as command  # noqa: F401

SETTINGS = Settings(steps=3, batch=2, length=48, held_out=0.1, rate=5e-3)
SHAPE = Lora(rank=4, alpha=8)


def test_the_whole_way(tiny: Path, english: Path, tmp_path: Path) -> None:
    found = deploy(tiny, tmp_path / "out", "int4-g32", data=english, settings=SETTINGS, lora=SHAPE, container="fewbits")
    assert [d.what for d in found.merged.distances] == [
        f"the adapter on {tiny.name} instead", "merged as F32", "quantized as int4-g32"]
    assert found.merged.text is not None and found.merged.text.startswith("held out of ")
    assert found.trained_on == "nf4" and found.merged.tuned == "nf4 with adapter"
    assert found.merged.quantized is not None and english.name in (found.merged.quantized.calibration or "")
    assert {t["solver"] for t in found.merged.quantized.tensors} == {"gptq", None}
    assert {p.name for p in tmp_path.iterdir()} == {
        "out", "out.adapter", "out.quantization.json", "out.log.jsonl"}
    assert containers.open(tmp_path / "out").container == "fewbits" and found.training["steps"] == 3
    settings = json.loads((tmp_path / "out.adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny) and settings["r"] == 4
    assert ".deploy" not in (tmp_path / "out.adapter" / "README.md").read_text()


@pytest.mark.parametrize("step", ["quantize", "finetune", "merge"])
def test_a_killed_call_goes_on(step: str, tiny: Path, english: Path, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    steps = {name: getattr(module, name) for name in ("quantize", "finetune", "merge")}

    def watched(name: str):
        def call(*given, **more):
            killed = name == step and name not in done
            done.append(name)
            if killed and name == "merge":
                raise KeyboardInterrupt
            found = steps[name](*given, **more)
            if killed:
                raise KeyboardInterrupt
            return found
        return call

    for name in steps:
        monkeypatch.setattr(module, name, watched(name))
    given = {"data": english, "settings": SETTINGS, "lora": SHAPE, "calibration": "none"}
    with pytest.raises(KeyboardInterrupt):
        deploy(tiny, tmp_path / "out.gguf", "Q8_0", **given)
    assert not (tmp_path / "out.gguf").exists()
    found = deploy(tiny, tmp_path / "out.gguf", "Q8_0", **given)
    assert done == ["quantize", "finetune", "merge"] + (["merge"] if step == "merge" else [])
    assert found.merged.container == "gguf" and (tmp_path / "out.gguf.adapter").is_dir()
    assert found.training["steps"] == 3 and not list(tmp_path.glob(".*"))


def test_a_model_that_is_quantized_already_is_trained_on_as_it_is(tiny: Path, english: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "base.gguf", "Q8_0", calibration="none")
    found = deploy(tmp_path / "base.gguf", tmp_path / "out", "nf4", data=english, settings=SETTINGS, lora=SHAPE,
                   calibration="none")
    assert found.trained_on == "the model as it is"
    assert [d.what for d in found.merged.distances] == ["merged as F16", "quantized as nf4"]


def test_windows_of_examples_that_differ_in_length() -> None:
    ids = torch.arange(100)
    data = Data(tuple(Example(part, part) for part in ids.split([7, 30, 50, 13])), "some")
    found = windows(data, 3, 20)
    assert [b["input_ids"].tolist() for b in found.batches] == [[ids[a:a + 20].tolist()] for a in (0, 20, 60)]
    assert windows(data, 3, 512).batches[0]["input_ids"].shape == (1, 100)


@pytest.mark.parametrize("arguments, message", [
    ({"to": "Q9"}, "unknown recipe 'Q9'"), ({"base": "nf5"}, "unknown recipe 'nf5'"),
    ({"into": "other"}, "--into other: nothing to merge into"),
    ({"data": "nothing.txt"}, "nothing.txt")])
def test_what_cannot_be_is_said_before_work_begins(arguments, message: str, tiny: Path, english: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "quantize", None)
    given = {"to": "Q8_0", "data": english, "settings": SETTINGS} | arguments
    with pytest.raises(FewbitsError, match=message):
        deploy(tiny, tmp_path / "out", given.pop("to"), **given)
    assert not list(tmp_path.iterdir())


def test_the_command(command: Run, tiny: Path, english: Path, tmp_path: Path) -> None:  # noqa: F811
    given = ("finetune", tiny, "--data", english, "-o", tmp_path / "out", "--deploy", "nf4")
    code, _, err = command(*given, "--adapter", tiny)
    assert code == 1 and "--adapter and --deploy: one of them" in err
    code, said, _ = command(*given, "--steps", "2", "--batch", "2", "--length", "48", "--rank", "4", "--calibration",
                            "none", "--into", "base")
    assert code == 0 and "quantized as nf4" in said and "instead" not in said
    assert f"adapter in {tmp_path / 'out.adapter'}, trained on nf4" in said
