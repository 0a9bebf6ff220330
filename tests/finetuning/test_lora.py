"""`finetune`: a standard adapter of any base, resumable, refused where it does not belong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.containers.base import remove
from fewbits.errors import FewbitsError
from fewbits.finetuning import loop, plot
from fewbits.finetuning.adapters import Lora
from fewbits.finetuning.loop import Settings

SETTINGS = Settings(steps=6, batch=4, length=32, rate=1e-2, save_every=0.0)
WEIGHTS = "adapter_model.safetensors"


def finetune(model: Path, out: Path, english: Path, **more: Any) -> Any:
    return fewbits.finetune(model, out, data=english, **{"settings": SETTINGS, "lora": Lora(4, 8), **more})


@pytest.fixture(scope="module")
def bases(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model in formats of every kind."""
    folder = tmp_path_factory.mktemp("bases")
    made = {"float": tiny}
    for name, to in (("nf4", "nf4"), ("int8", "int8"), ("gptq", "int4-g32"), ("gguf.gguf", "Q8_0")):
        made[name] = fewbits.quantize(tiny, folder / name, to, calibration="none").path
    return made


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "draw", lambda outcome, file: False)  # which costs more than the training


@pytest.fixture(scope="module")
def first(bases: dict[str, Path], english: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An adapter of the nf4 base."""
    return finetune(bases["nf4"], tmp_path_factory.mktemp("first") / "a", english)


@pytest.mark.parametrize("base", ["float", "nf4", "int8", "gptq", "gguf.gguf"])
def test_an_adapter_of_every_kind_of_base(base: str, bases: dict[str, Path], tiny: Path, english: Path,
                                          tmp_path: Path) -> None:
    """It learns, and does on the base, in plain Transformers, what it does on the packed weights."""
    found = finetune(bases[base], tmp_path / "a", english)
    losses = [loss for _, loss in found.outcome.held_out]
    assert losses[-1] < losses[0] and not list(tmp_path.glob(".*"))
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {"adapter_config.json", WEIGHTS, "loss.json"}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str(bases[base]) and config["inference_mode"]
    packed = fewbits.load(bases[base], kernel="decode")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    values = {name: e.load().dequantize() for name, e in packed.checkpoint.entries.items()}
    plain.load_state_dict({n: values[n] for n in plain.state_dict() if n in values}, strict=False)
    x = torch.arange(3, 40)[None]
    on_packed = peft.PeftModel.from_pretrained(packed, tmp_path / "a").eval()
    on_plain = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(on_packed(input_ids=x).logits, on_plain(input_ids=x).logits, rtol=1e-3, atol=1e-3)
        with on_plain.disable_adapter():
            bare = on_plain(input_ids=x).logits
    assert (bare - on_packed(input_ids=x).logits).abs().max() > 0.01


def test_a_base_quantized_on_loading_and_settings(tiny: Path, english: Path, tmp_path: Path) -> None:
    """Gradient checkpointing changes no value, half-kept activations next to none; targets are what was asked."""
    found = {}
    for name, more in (("kept", {"compact": False}), ("again", {"checkpointing": True, "compact": False}),
                       ("halved", {})):
        settings = Settings(**{**SETTINGS.__dict__, **more})
        result = finetune(tiny, tmp_path / name, english, recipe="nf4", settings=settings,
                          lora=Lora(4, 8, targets=("q_proj", "down_proj")))
        found[name] = load_file(tmp_path / name / WEIGHTS)
        assert result.base == str(tiny)
    assert len(found["kept"]) == 2 * 2 * 2 and all("q_proj" in n or "down_proj" in n for n in found["kept"])
    for name, value in found["kept"].items():
        torch.testing.assert_close(found["again"][name], value, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found["halved"][name], value, rtol=0.2, atol=5e-3)


def test_bfloat16(tiny: Path, english: Path, tmp_path: Path) -> None:
    found = finetune(tiny, tmp_path / "a", english, recipe="nf4", settings=Settings(**{
        **SETTINGS.__dict__, "dtype": "bfloat16"}))
    assert found.outcome.held_out[-1][1] < found.outcome.held_out[0][1]
    assert {t.dtype for t in load_file(tmp_path / "a" / WEIGHTS).values()} == {torch.float32}


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_to_the_same_bytes(bases: dict[str, Path], english: Path, tmp_path: Path) -> None:
    whole = finetune(bases["nf4"], tmp_path / "a", english, lora=Lora(4, 8, dropout=0.3))

    def kill(what: str, done: int, total: int) -> None:
        if what.startswith("fine-tuning") and done == 4:
            raise Killed

    with pytest.raises(Killed):
        finetune(bases["nf4"], tmp_path / "b", english, lora=Lora(4, 8, dropout=0.3), progress=kill)
    assert not (tmp_path / "b").exists()
    begun: list[int] = []
    resumed = finetune(bases["nf4"], tmp_path / "b", english, lora=Lora(4, 8, dropout=0.3),
                       progress=lambda what, done, total: begun.append(done) if what.startswith("fine") else None)
    assert min(begun) >= 4 and resumed.outcome.losses == whole.outcome.losses
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (tmp_path / "a" / WEIGHTS).read_bytes()


def test_other_settings_begin_anew(bases: dict[str, Path], english: Path, tmp_path: Path) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if what.startswith("fine-tuning") and done == 4:
            raise Killed

    with pytest.raises(Killed):
        finetune(bases["nf4"], tmp_path / "a", english, progress=kill)
    begun: list[int] = []
    finetune(bases["nf4"], tmp_path / "a", english, settings=Settings(**{**SETTINGS.__dict__, "rate": 2e-2}),
             progress=lambda what, done, total: begun.append(done) if what.startswith("fine") else None)
    assert min(begun) == 1


def test_an_adapter_to_go_on_from(first: Any, bases: dict[str, Path], english: Path, tmp_path: Path) -> None:
    found = finetune(bases["nf4"], tmp_path / "b", english, adapter=first.path, lora=Lora(16))
    assert found.outcome.held_out[0][1] == pytest.approx(first.outcome.held_out[-1][1], rel=1e-4)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["r"] == 4


def test_an_adapter_of_another_model(first: Any, bases: dict[str, Path], english: Path, tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    weights = load_file(first.path / WEIGHTS)
    cases = [(weights | {name: torch.zeros(4, 100)}, r"layers.0.mlp.down_proj.lora_A.weight is \[4, 100\], and the "
              r"model takes \[4, 172\]"),
             (weights | {name: torch.zeros(8, 172)}, r"is \[8, 172\], and the model takes \[4, 172\]"),
             (weights | {name.replace("0", "7"): torch.zeros(4, 172)}, "layers.7.* and the model does not have it"),
             ({n: w for n, w in weights.items() if n != name}, "down_proj.lora_A.weight is missing")]
    for i, (changed, message) in enumerate(cases):
        other = tmp_path / f"other-{i}"
        shutil.copytree(first.path, other)
        save_file(changed, other / WEIGHTS)
        with pytest.raises(FewbitsError, match=message) as error:
            finetune(bases["nf4"], tmp_path / "b", english, adapter=other)
        assert error.value.hint == "it belongs to another model"
    with pytest.raises(FewbitsError, match="no adapter_config.json"):
        finetune(bases["nf4"], tmp_path / "b", english, adapter=tmp_path)


def test_nan_keeps_the_last_good_adapter(bases: dict[str, Path], english: Path, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    class Spoilt(loop.CausalLoss):
        calls = 0

        def __call__(self, model: Any, inputs: Any) -> torch.Tensor:
            value = super().__call__(model, inputs)
            self.calls += torch.is_grad_enabled()
            return value * float("nan") if self.calls == 4 else value

    monkeypatch.setattr(loop, "CausalLoss", Spoilt)
    with pytest.raises(FewbitsError, match=r"not finite at step 4: .* after step 3 is in .*a\.step-3$") as error:
        finetune(bases["nf4"], tmp_path / "a", english)
    assert "--rate" in (error.value.hint or "") and [p.name for p in tmp_path.iterdir()] == ["a.step-3"]
    monkeypatch.undo()
    remove(tmp_path / "a")
    again = finetune(bases["nf4"], tmp_path / "a", english, adapter=tmp_path / "a.step-3")
    assert all(bool(t.isfinite().all()) for t in load_file(again.path / WEIGHTS).values())


def test_the_same_adapter_for_llama_cpp(tiny: Path, english: Path, tmp_path: Path) -> None:
    from fewbits.containers import gguf_lora

    found = finetune(tiny, tmp_path / "a", english, recipe="nf4", gguf=tmp_path / "a.gguf")
    assert found.gguf == tmp_path / "a.gguf"
    config = json.loads((tiny / "config.json").read_text())
    both = [gguf_lora.read_lora(path, config).pairs for path in (tmp_path / "a", tmp_path / "a.gguf")]
    assert both[0].keys() == both[1].keys() and len(both[0]) == 14
    for name, pair in both[0].items():
        torch.testing.assert_close(both[1][name].delta(), pair.delta(), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_fine_tuned(tiny: Path, english: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="--targets nothing_of_it,else: Target modules"):
        finetune(tiny, tmp_path / "a", english, lora=Lora(targets=("nothing_of_it", "else")))
    with pytest.raises(FewbitsError, match="--dtype float16: no type to train in"):
        finetune(tiny, tmp_path / "a", english, settings=Settings(dtype="float16"))
    (tmp_path / "there").mkdir()
    with pytest.raises(FewbitsError, match="exists already"):
        finetune(tiny, tmp_path / "there", english)
    config = transformers.BertConfig(vocab_size=262, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=2)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "bert")
    with pytest.raises(FewbitsError, match="BertModel does not continue text"):
        finetune(tmp_path / "bert", tmp_path / "a", english)


@pytest.mark.parametrize("safe", [False, True])
def test_peft_merges_nothing_into_codes(safe: bool, bases: dict[str, Path]) -> None:
    net = fewbits.load(bases["int8"])
    codes = [m.weight.clone() for m in net.modules() if hasattr(m, "prepared")]
    tuned = peft.get_peft_model(net, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    for merge in (tuned.merge_and_unload, tuned.merge_adapter):
        with pytest.raises(FewbitsError, match="q_proj: nothing can be merged into packed codes") as error:
            merge(safe_merge=safe)
        assert "fewbits merge" in (error.value.hint or "")
    bare = tuned.unload()
    assert not any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in bare.modules())
    assert all(torch.equal(a, m.weight) for a, m in zip(
        codes, (m for m in bare.modules() if hasattr(m, "prepared")), strict=True))


def test_peft_merges_into_floats_as_ever(tiny: Path, bases: dict[str, Path]) -> None:
    fewbits.load(bases["nf4"])
    tuned = peft.get_peft_model(fewbits.load(tiny), peft.LoraConfig(target_modules="all-linear"))
    assert type(tuned.merge_and_unload()) is transformers.LlamaForCausalLM
