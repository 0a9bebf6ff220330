"""Merging as a whole: what is written, what each step is said to cost, and what a killed merge leaves."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

import fewbits
from fewbits import containers, merging
from fewbits.containers import gguf_lora
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError
from fewbits.merging import merge
from fewbits.quantizing import quantize
from tests.cli.conftest import Run
from tests.cli.conftest import fewbits as command  # noqa: F401


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    folder = tmp_path_factory.mktemp("adapters") / "tuned"
    model.save_pretrained(folder)
    return folder


def tuned(tiny: Path, adapter: Path) -> torch.nn.Module:
    return peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tiny), adapter).eval()


def test_a_directory_in_the_models_own_floats(tiny, adapter, english, tmp_path):
    found = merge(adapter, tiny, tmp_path / "out", text=english)
    assert (found.container, found.recipe, found.changed, found.rank) == ("transformers", "F32", 14, 4)
    (own,) = found.distances
    assert own.what == "merged as F32" and own.kl < 1e-9
    wanted = tuned(tiny, adapter).merge_and_unload().state_dict()
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.allclose(back[name], value, atol=1e-6) for name, value in wanted.items())
    assert (tmp_path / "out" / "tokenizer.json").exists() and not list(tmp_path.glob(".*"))


def test_quantized_again_with_the_divergence_of_each_step(tiny, adapter, english, tmp_path):
    out = tmp_path / "out"
    found = merge(adapter, tiny, out, to="int4-g32", dtype="f16", container="fewbits", text=english,
                  calibration=english, samples=4, length=32)
    assert [d.what for d in found.distances] == ["merged as F16", "quantized as int4-g32"]
    first, second = found.distances
    assert first.kl < 1e-5 < second.kl and found.quantized is not None
    assert {row["solver"] for row in found.quantized.tensors} == {"gptq", None}
    assert not list(tmp_path.glob(".*"))
    # the same figure, from peft's own model and the decoded file
    text = merging.sources.calibration(english, containers.open(tiny), samples=4, length=512, seed=1)
    quantized, exact = fewbits.load(out, kernel="decoded"), tuned(tiny, adapter)
    with torch.no_grad():
        kls = []
        for batch in text.batches:
            p, q = (net(**batch).logits[0, :-1].log_softmax(-1) for net in (exact, quantized))
            kls.append((p.exp() * (p - q)).sum(-1))
    assert second.kl == pytest.approx(float(torch.cat(kls).mean()), rel=0.1)


def test_a_base_that_the_adapter_was_not_trained_on(tiny, adapter, english, tmp_path):
    quantize(tiny, tmp_path / "nf4", "nf4", calibration="none")
    found = merge(adapter, tiny, tmp_path / "out", trained_on=tmp_path / "nf4", text=english)
    assert [d.what for d in found.distances] == [f"the adapter on {tiny.name} instead", "merged as F32"]
    assert found.distances[0].kl == pytest.approx(found.distances[1].kl) and found.distances[0].kl > 1e-4
    assert "trained on" in found.notes[0] and found.tuned == "nf4 with tuned"
    own = merge(adapter, tmp_path / "nf4", tmp_path / "decoded", trained_on=tmp_path / "nf4", text=english, dtype="f32")
    assert own.distances[0].kl < 1e-9  # the decoded base


def test_the_adapters_own_record_names_what_it_was_trained_on(tiny, adapter, english, tmp_path):
    quantize(tiny, tmp_path / "nf4", "nf4", calibration="none")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in adapter.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": f"{tmp_path / 'nf4'}"}))
    assert len(merge(copy, tiny, tmp_path / "out", text=english).distances) == 2
    (copy / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "org/other"}))
    found = merge(copy, tiny, tmp_path / "more", text="none")
    assert "trained on org/other" in found.notes[0] and not found.distances


def test_a_llama_cpp_adapter_and_a_gguf_file(tiny, adapter, tmp_path):
    gguf_lora.to_gguf(adapter, containers.open(tiny).config, tmp_path / "a.gguf")
    merge(adapter, tiny, tmp_path / "out.gguf", text="none")
    found = merge(tmp_path / "a.gguf", tiny, tmp_path / "same", text="none")
    assert found.container == "transformers"
    one, other = (containers.open(tmp_path / name).entries for name in ("out.gguf", "same"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[n].load().dequantize(), other[n].load().dequantize(), atol=1e-6) for n in one)


def test_a_killed_merge_goes_on_with_the_sum_that_is_there(tiny, adapter, tmp_path, monkeypatch):
    out, sums, killed = tmp_path / "out", [], []
    write, begin = merging.write, merging.quantize

    def counted(container, path: Path, *rest: object):
        sums.append(path)
        return write(container, path, *rest)

    def kill(*args: object, progress: Progress | None = None, **options: object):
        if not killed:
            killed.append(1)
            raise KeyboardInterrupt
        return begin(*args, progress=progress, **options)

    monkeypatch.setattr(merging, "write", counted)
    monkeypatch.setattr(merging, "quantize", kill)
    with pytest.raises(KeyboardInterrupt):
        merge(adapter, tiny, out, to="Q8_0", text="none")
    assert not out.exists()
    merge(adapter, tiny, out, to="Q8_0", text="none", calibration="none")
    assert len(sums) == 1 and out.exists() and not list(tmp_path.glob(".*"))
    killed.clear()  # another adapter begins anew
    with pytest.raises(KeyboardInterrupt):
        merge(adapter, tiny, tmp_path / "b", to="Q8_0", text="none")
    monkeypatch.setattr(merging, "_digest", lambda found: "another")
    merge(adapter, tiny, tmp_path / "b", to="Q8_0", text="none")
    assert len(sums) == 3


def test_a_model_without_logits_of_tokens_is_merged_and_not_measured(tmp_path):
    torch.manual_seed(0)
    net = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7,
        num_channels=1))
    net.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    found = merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", to="int8", calibration="none")
    assert not found.distances and any("not measured: ViTForImageClassification does not" in n for n in found.notes)


@pytest.mark.parametrize("arguments, message", [
    ({"dtype": "int4"}, "--dtype int4: not a float type"),
    ({"solver": "gptq"}, "solver is about quantizing, and no recipe is asked for"),
    ({"to": "Q9"}, "unknown recipe 'Q9'"),
    ({"out": "base"}, "output and input are the same"),
    ({"out": "adapter"}, "exists already"),
    ({"out": "inside"}, "output and input are the same"),
    ({"text": "nothing.txt"}, "nothing.txt"),
])
def test_what_goes_wrong(arguments, message, tiny, adapter, tmp_path):
    out = {"base": tiny, "adapter": adapter, "inside": adapter / "out"}.get(arguments.pop("out", ""), tmp_path / "out")
    with pytest.raises(FewbitsError, match=message):
        merge(adapter, tiny, out, **arguments)


def test_the_command(command: Run, tiny, adapter, english, tmp_path):  # noqa: F811
    code, said, err = command("merge", adapter, tiny, "-o", tmp_path / "out", "--to", "Q8_0", "--calibration", "none",
                              "--text", english)
    assert code == 0 and "merged as F32" in said and "quantized as Q8_0" in said and "14 tensors changed" in said
    code, said, _ = command("merge", adapter, tiny, "-o", tmp_path / "more", "--text", "none", "--json")
    assert code == 0 and json.loads(said)["recipe"] == "F32"
    code, said, err = command("merge", tiny, tiny, "-o", tmp_path / "no")
    assert code == 1 and not said and "no adapter" in err and len(err.splitlines()) == 2
