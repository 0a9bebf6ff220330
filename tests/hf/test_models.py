"""What loaded models are good for: publishing, training adapters; and code that comes with a model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

import fewbits
from fewbits import FewbitsConfig
from fewbits.errors import FewbitsError
from tests.hf.models import IDS, described, logits, packed, pretrained


class Hub:
    """In the place of the hub's API: keeps what is uploaded."""

    def __init__(self, folder: Path):
        self.folder, self.created = folder, list[str]()

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.created.append(repo_id)
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations: list[Any], **options: Any) -> None:
        for operation in operations:
            data = operation.path_or_fileobj
            (self.folder / operation.path_in_repo).write_bytes(data if isinstance(data, bytes)
                                                               else Path(data).read_bytes())


@pytest.mark.parametrize("recipe", ["nf4", "kmeans4"])
def test_push_to_hub(recipe: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", lambda name, **_: ModelCard("---\ntags: []\n---\n"))
    for net in (fewbits.load(tiny, recipe=recipe), pretrained(tiny, quantization_config=FewbitsConfig(recipe))):
        net.push_to_hub("someone/model")
        assert described(tmp_path)["quant_method"] == ("bitsandbytes" if recipe == "nf4" else "fewbits")
        assert torch.equal(logits(fewbits.load(tmp_path)), logits(net))
    assert hub.created == ["someone/model"] * 2


@pytest.mark.parametrize("recipe", ["nf4", "int8", "Q8_0"])
@pytest.mark.filterwarnings("ignore:.*does not divide:fewbits.notes.Differs")
def test_adapters_train_on_it(recipe: str, tiny: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    net = pretrained(tiny, quantization_config=FewbitsConfig(recipe))
    codes = {n: p.clone() for n, p in net.named_parameters() if p.dtype == torch.uint8}
    torch.manual_seed(0)
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules="all-linear"))
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, learning_rate=2e-2, report_to=[],
        logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True)
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(p, codes[n]) for n, p in net.named_parameters() if n in codes) and len(codes) >= 13


def test_a_quantized_model_alone_is_not_trained(tiny: Path, tmp_path: Path) -> None:
    """Transformers refuses for all quantized models: their weights would stay as they are."""
    for net in (fewbits.load(tiny, recipe="nf4"), pretrained(tiny, quantization_config=FewbitsConfig("nf4"))):
        with pytest.raises(ValueError, match="purely quantized"):
            transformers.Trainer(model=net, args=transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_kind"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_beside_a_model_is_not_run_unasked(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    pretrained(tiny).save_pretrained(folder)
    (folder / "modeling_own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own_kind", "architectures": ["OwnForCausalLM"],
           "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    for options in ({}, {"recipe": "nf4"}):
        with pytest.raises(FewbitsError, match=r"its model is code of its own \(modeling_own.OwnConfig\)"):
            fewbits.load(folder, **options)
    net = fewbits.load(folder, recipe="nf4", trust_remote_code=True)
    assert type(net).__name__ == "OwnForCausalLM" and packed(net) == 14
    assert torch.equal(logits(net), logits(fewbits.load(tiny, recipe="nf4")))


def test_an_id_without_a_network_is_one_line() -> None:
    with pytest.raises(FewbitsError, match="someone/nothing-here: .*could not be downloaded") as error:
        fewbits.load("someone/nothing-here", recipe="nf4")
    assert "\n" not in str(error.value)
