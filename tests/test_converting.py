"""Conversions between containers: what is said of each tensor is true, and what would change is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits import containers
from fewbits.converting import DECODED, KEPT, RECODED, ROUNDED, convert, summary
from fewbits.errors import FewbitsError
from fewbits.quantizing import quantize
from tests.arch.models import MODELS, directory
from tests.arch.models import tiny as small


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory):
    """The tiny model in a recipe, each made once."""
    folder = tmp_path_factory.mktemp("made")

    def make(recipe: str, name: str, **options: object) -> Path:
        path = folder / name
        if not path.exists():
            quantize(tiny, path, recipe, solver="nearest", **options)  # type: ignore[arg-type]
        return path

    return make


def equal(a: Path, b: Path) -> bool:
    old, new = containers.open(a), containers.open(b)
    return old.entries.keys() == new.entries.keys() and all(
        torch.equal(e.load().dequantize(), new.entries[n].load().dequantize()) for n, e in old.entries.items())


def hows(result) -> set[str]:
    return {step.how for step in result.tensors}


def test_symmetric_gptq_becomes_q4_0_and_comes_back(made, tmp_path: Path) -> None:
    source = made("int4-g32", "gptq", overrides=["*.down_proj.weight=f32"])  # 172 columns: no block divides them
    there = convert(source, tmp_path / "a.gguf")
    assert there.lossless and hows(there) == {KEPT, RECODED} and equal(source, tmp_path / "a.gguf")
    assert ("int4-g32", "Q4_0") in {row[:2] for row in summary(there)}
    back = convert(tmp_path / "a.gguf", tmp_path / "b")
    assert back.container == "gptq" and back.lossless and equal(source, tmp_path / "b")


def test_without_a_name_the_layout_is_one_that_keeps_every_value(made, tmp_path: Path) -> None:
    floats = {"*embed*": "f32", "*.down_proj.weight": "f32"}
    source = made("Q4_1", "q4_1.gguf", overrides=floats)  # its minimums are no multiples of their scales
    assert convert(source, tmp_path / "out").container == "fewbits" and equal(source, tmp_path / "out")
    assert convert(made("Q4_0", "q4_0.gguf", overrides=floats), tmp_path / "other").container == "gptq"


def test_gptq_versions(made, tmp_path: Path) -> None:
    source = made("int4-g32", "gptq", overrides=["*.down_proj.weight=f32"])
    result = convert(source, tmp_path / "v2", "gptq-v2")
    assert hows(result) == {KEPT} and equal(source, tmp_path / "v2")
    assert containers.open(tmp_path / "v2").facts["quantization_config"]["checkpoint_format"] == "gptq_v2"


def test_embedding_that_a_layout_keeps_in_floats_is_decoded_exactly(made, tmp_path: Path) -> None:
    source = made("Q8_0", "q8.gguf")
    result = convert(source, tmp_path / "gptq", "gptq")
    by_name = {step.name: step for step in result.tensors}
    assert by_name["model.embed_tokens.weight"].how == DECODED
    assert by_name["model.layers.0.self_attn.q_proj.weight"].how == RECODED
    assert result.lossless and equal(source, tmp_path / "gptq")


def test_every_codec_decodes_into_a_transformers_directory(made, tmp_path: Path) -> None:
    source = made("nf4", "nf4")
    result = convert(source, tmp_path / "floats", "transformers")
    assert result.lossless and hows(result) == {KEPT, DECODED} and equal(source, tmp_path / "floats")


def test_lossy_is_refused_then_measured(made, tmp_path: Path) -> None:
    source = made("nf4", "nf4")
    with pytest.raises(FewbitsError, match=r"14 of 20 tensors would change their values in gptq, model.layers.0.*nf4 "
                                           "would become int4-g32-asym") as caught:
        convert(source, tmp_path / "out", "gptq")
    assert caught.value.hint and "--lossy" in caught.value.hint
    assert not (tmp_path / "out").exists()
    result = convert(source, tmp_path / "out", "gptq", lossy=True)
    assert not result.lossless
    for step in result.tensors:
        assert (step.how == ROUNDED) == (0 < step.error < 0.1), step


def test_float_types(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="would change their values"):
        convert(tiny, tmp_path / "half", "f16")
    half = convert(tiny, tmp_path / "half", "f16", lossy=True)
    assert half.container == "transformers" and all(step.error < 1e-3 for step in half.tensors)
    assert convert(tmp_path / "half", tmp_path / "half.gguf").lossless
    assert convert(tmp_path / "half.gguf", tmp_path / "full", "f32").lossless
    assert equal(tmp_path / "half", tmp_path / "full")


@pytest.mark.parametrize("out, to, message", [
    ("x", "gptq", "nothing in it is quantized"), ("x.gguf", "gptq", "gptq is written to a directory"),
    ("x", "gguf", r"gguf is written to a file \*.gguf"), ("x", "Q4_K_M", "neither a container nor a float type"),
])
def test_what_makes_no_sense_is_refused(tiny: Path, tmp_path: Path, out: str, to: str, message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        convert(tiny, tmp_path / out, to)


def test_split(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "parts", split=200_000)
    assert len(list((tmp_path / "parts").glob("*-of-*.gguf"))) > 1 and equal(tiny, tmp_path / "parts")
    convert(tmp_path / "parts", tmp_path / "joined.gguf")
    assert equal(tiny, tmp_path / "joined.gguf")
    with pytest.raises(FewbitsError, match="only GGUF is split"):
        convert(tiny, tmp_path / "x", "gptq", split=100_000)


def test_adapter_there_and_back(tiny: Path, tmp_path: Path) -> None:
    peft = tmp_path / "peft"
    peft.mkdir()
    draw = torch.Generator().manual_seed(0)
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    tensors = {f"{module}.lora_A.weight": torch.randn(4, 96, generator=draw),
               f"{module}.lora_B.weight": torch.randn(96, 4, generator=draw)}
    save_file(tensors, peft / "adapter_model.safetensors")
    (peft / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}))
    with pytest.raises(FewbitsError, match="is a LoRA adapter"):
        convert(peft, tmp_path / "a.gguf")
    result = convert(peft, tmp_path / "a.gguf", base=tiny)
    assert (result.source, result.container, len(result.tensors)) == ("peft", "gguf-lora", 2)
    convert(tmp_path / "a.gguf", tmp_path / "back", base=tiny)
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in tensors)
    with pytest.raises(FewbitsError, match="not a LoRA adapter"):
        convert(tiny, tmp_path / "x", base=tiny)


@pytest.mark.parametrize("name", MODELS)
def test_codes_of_every_family_go_to_gguf_and_back(name: str, tmp_path: Path, tiny: Path) -> None:
    folder = directory(small(MODELS[name]), tmp_path / "source", tiny)
    quantize(folder, tmp_path / "q", "int4-g32", solver="nearest")
    there = convert(tmp_path / "q", tmp_path / "a.gguf")
    moved = {step.after for step in there.tensors if step.before == "int4-g32"}
    assert there.lossless and moved == {"Q4_0"} and equal(tmp_path / "q", tmp_path / "a.gguf")
    back = convert(tmp_path / "a.gguf", tmp_path / "b", "gptq")
    assert back.lossless and equal(tmp_path / "q", tmp_path / "b")
