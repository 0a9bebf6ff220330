"""What Transformers' own configurations ask for is loaded by fewbits, where it is told so; and no longer afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AwqConfig, BitsAndBytesConfig, GPTQConfig
from transformers.quantizers import auto

import fewbits
from fewbits.errors import FewbitsError
from fewbits.hf import FewbitsQuantizer, disable, enable
from fewbits.runtime.linear import QLinear
from tests.hf.models import described, logits, packed, pretrained


@pytest.fixture
def enabled() -> Iterator[None]:
    enable(force=True)
    yield
    disable()


def test_tables_are_changed_once_and_changed_back() -> None:
    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    enable()
    enable(force=True)
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is not before[0]["gptq"]
    disable()
    disable()
    assert before == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)


class Own:
    """In the place of Transformers' quantizer for bitsandbytes."""

    error: Exception | None = None

    def __init__(self, config: Any, **kwargs: Any):
        self.quantization_config, self.pre_quantized = config, False

    def validate_environment(self, **kwargs: Any) -> None:
        if self.error:
            raise self.error


def test_what_works_here_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit", Own)
    config = BitsAndBytesConfig(load_in_4bit=True)
    try:
        for error, force, ours in ((None, False, False), (None, True, True), (ImportError("no package"), False, True),
                                   (RuntimeError("no kernel here"), False, True)):
            monkeypatch.setattr(Own, "error", error)
            enable(force)
            made = auto.AutoHfQuantizer.from_config(config, pre_quantized=False)
            assert isinstance(made, FewbitsQuantizer if ours else Own)
    finally:
        disable()


@pytest.mark.parametrize("options,recipe", [
    ({"load_in_8bit": True}, "int8"), ({"load_in_4bit": True}, "fp4"),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}, "nf4"),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4-dq")])
def test_bitsandbytes_without_it(enabled: None, options: dict[str, Any], recipe: str, tiny: Path,
                                 tmp_path: Path) -> None:
    net = pretrained(tiny, quantization_config=BitsAndBytesConfig(**options), device_map="auto")
    assert "bitsandbytes" not in sys.modules and packed(net) == 14
    assert torch.equal(logits(net), logits(fewbits.load(tiny, recipe=recipe)))
    net.save_pretrained(tmp_path / "a")
    kept = {k: v for k, v in BitsAndBytesConfig(**options).to_dict().items() if not k.startswith("llm_int8_skip")}
    assert {k: v for k, v in described(tmp_path / "a").items() if k in kept} == kept
    again = pretrained(tmp_path / "a")
    assert type(again.config.quantization_config) is BitsAndBytesConfig
    assert torch.equal(logits(again), logits(net))


def test_threshold_and_skipped_modules(enabled: None, tiny: Path, tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=4.5, llm_int8_skip_modules=["down_proj"])
    net = pretrained(tiny, quantization_config=config)
    assert packed(net) == 12

    def thresholds(model: torch.nn.Module) -> set[float | None]:
        return {vars(m.prepared)["outliers"] for m in model.modules() if isinstance(m, QLinear)}

    assert thresholds(net) == {4.5}
    net.save_pretrained(tmp_path / "a")
    assert described(tmp_path / "a")["llm_int8_threshold"] == 4.5
    assert thresholds(fewbits.load(tmp_path / "a")) == thresholds(pretrained(tmp_path / "a")) == {4.5}
    assert thresholds(fewbits.load(tmp_path / "a", outliers=0)) == {None}
    assert thresholds(fewbits.load(tiny, recipe="int8")) == {6.0}


@pytest.mark.filterwarnings("ignore:calibrated on:fewbits.notes.Differs")
@pytest.mark.parametrize("desc_act,sym", [(False, True), (True, False)])
def test_gptq_calibrates_on_its_data_set(enabled: None, desc_act: bool, sym: bool, tiny: Path, tmp_path: Path,
                                         english: Path) -> None:
    lines = [line for line in english.read_text().splitlines() if len(line) > 60][:6]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    config = GPTQConfig(bits=4, group_size=32, dataset=lines, tokenizer=tokenizer, desc_act=desc_act, sym=sym)
    net = pretrained(tiny, quantization_config=config)
    batches = [{"input_ids": tokenizer(line, return_tensors="pt")["input_ids"]} for line in lines]
    out = fewbits.quantize(tiny, tmp_path / "a", "int4-g32" if sym else "int4-g32-asym", calibration=batches,
                           solver="gptq-act-order" if desc_act else "gptq").path
    assert torch.equal(logits(net), logits(fewbits.load(out)))
    net.save_pretrained(tmp_path / "b")
    assert described(tmp_path / "b") == described(out)
    assert torch.equal(logits(pretrained(out)), logits(net))


@pytest.mark.parametrize("recipe,container", [("int4-g32-asym", "awq"), ("int4-g32", "compressed-tensors"),
                                              ("fp8-e4m3", "compressed-tensors")])
def test_checkpoints_of_missing_packages(enabled: None, recipe: str, container: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=70, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                                      num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    out = fewbits.quantize(tmp_path / "m", tmp_path / "a", recipe, container=container, solver="search").path
    net = pretrained(out)
    assert packed(net) == 7 and torch.equal(logits(net), logits(fewbits.load(out)))
    net.save_pretrained(tmp_path / "b")
    assert described(tmp_path / "b") == described(out)


def test_the_kernel_can_be_named(tiny: Path) -> None:
    enable(force=True, kernel="decoded")
    net = pretrained(tiny, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    disable()
    assert torch.equal(logits(net), logits(fewbits.load(tiny, recipe="int8", kernel="decoded")))


def test_without_it_packages_are_missed(tiny: Path, tmp_path: Path) -> None:
    out = fewbits.quantize(tiny, tmp_path / "a", "int4-g32", solver="search").path
    with pytest.raises(ImportError):
        pretrained(out)


@pytest.mark.parametrize("config,message", [
    (BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True), "llm_int8_has_fp16_weight keeps a copy"),
    (BitsAndBytesConfig(), "BitsAndBytesConfig asks for nothing"),
    (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf3"), "bnb_4bit_quant_type 'nf3'"),
    (AwqConfig(), "AwqConfig describes weights that are quantized already, and these are not")])
def test_what_cannot_be_is_refused(enabled: None, config: Any, message: str, tiny: Path) -> None:
    with pytest.raises(FewbitsError, match=message):
        pretrained(tiny, quantization_config=config)
