"""The whole way of a weight on a tiny model: every container, bad input, resume, what is said of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fewbits
from fewbits import containers, solvers
from fewbits.calibration import sources
from fewbits.calibration.walk import Walk
from fewbits.errors import FewbitsError
from fewbits.jobs.store import Store

RECIPES = {"Q8_0": "a.gguf", "Q4_0": "a.gguf", "int4-g128": "a", "int3-g32-asym": "a", "int8": "a", "nf4": "a",
           "nf4-dq": "a", "fp4": "a", "f16": "a",
           "w8a8": "a", "w8a8-asym": "a",
           "kmeans4": "a", "kmeans2": "a", "fp8-e4m3": "a", "fp8-e5m2": "a", "fp8-e4m3-b4": "a"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_file_holds_what_the_solver_chose(recipe: str, tiny: Path, tmp_path: Path) -> None:
    result = fewbits.quantize(tiny, tmp_path / RECIPES[recipe], recipe, calibration="none")
    source, got = containers.open(tiny), containers.open(result.path)
    assert got.entries.keys() == source.entries.keys()
    for row in result.tensors:
        entry, original = got.entries[row["name"]], source.entries[row["name"]].load().dequantize()
        values = entry.load().dequantize()
        if row["solver"]:
            assert torch.equal(values, solvers.solve(original, entry.codec, row["solver"]).dequantize()), row["name"]
        else:
            assert torch.equal(values, original.to(torch.float16).float() if entry.codec.name == "F16" else original)
    assert not list(tmp_path.glob(".*")), "nothing is left beside the output"


@pytest.mark.parametrize("recipe", ["Q8_0", "int4-g32", "nf4", "kmeans4", "fp8-e4m3-b4"])
def test_every_result_is_near_the_original(recipe: str, tiny: Path, tmp_path: Path, english: Path) -> None:
    out = fewbits.quantize(tiny, tmp_path / RECIPES.get(recipe, "a"), recipe, calibration="none").path
    found = fewbits.evaluate(out, tiny, text=english, chunks=2, context=64)
    itself = fewbits.evaluate(tiny, tiny, text=english, chunks=2, context=64)
    assert itself.kl_mean == pytest.approx(0, abs=1e-6) and itself.top1 == 1
    assert 0 < found.kl_mean < (0.01 if recipe == "Q8_0" else 0.5)


@pytest.mark.parametrize("recipe", ["int3-g32", "Q4_0", "nf4-b32", "kmeans3", "fp8-e5m2", "fp8-e4m3-b4"])
def test_gptq_is_nearer_than_nearest(recipe: str, tiny: Path, tmp_path: Path, english: Path) -> None:
    """On layer outputs: what GPTQ minimises, measured on the logits of its own calibration text."""
    def kl(solver: str) -> float:
        out = tmp_path / solver / RECIPES.get(recipe, "a")
        out.parent.mkdir()
        fewbits.quantize(tiny, out, recipe, solver=solver, calibration=english, samples=24, length=128)
        return fewbits.evaluate(out, tiny, text=english, chunks=8, context=128).kl_mean or 0.0

    assert kl("gptq") < kl("nearest")


def test_shares_the_inputs_of_queries_keys_and_values(tiny: Path, english: Path) -> None:
    source = containers.open(tiny)
    tokens = sources.calibration(english, source, samples=2, length=32).batches
    block = next(iter(Walk(source, tokens)))
    found = block.statistics()
    at = "model.layers.0.self_attn."
    assert found[at + "q_proj.weight"] is found[at + "k_proj.weight"] is found[at + "v_proj.weight"]
    assert found[at + "q_proj.weight"] is not found[at + "o_proj.weight"]
    assert {s.count for s in found.values()} == {64}


FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM,
               {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}),
    "gpt_neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM, {}),  # outside the table
}


@pytest.mark.parametrize("family", FAMILIES)
def test_walk_equals_the_model(family: str, tmp_path: Path) -> None:
    """Hidden states carried block by block are those of the model run as a whole."""
    config, model, more = FAMILIES[family]
    torch.manual_seed(0)
    whole = model(config(vocab_size=90, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         initializer_range=0.2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=64, **more)).eval()
    whole.save_pretrained(tmp_path / "m")
    tokens = torch.randint(0, 90, (2, 24))
    walk = Walk(containers.open(tmp_path / "m"), [{"input_ids": row[None]} for row in tokens])
    counts = [len(block.statistics()) for block in walk]
    assert counts == [4, 4] if family == "gpt_neox" else [7, 7]
    last = [m for m in whole.base_model.children() if "Norm" in type(m).__name__][-1]
    with torch.inference_mode():
        want = whole.base_model(input_ids=tokens).last_hidden_state
        got = torch.cat([last(x) for x in walk.inputs])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_killed_run_resumes_and_ends_equal(tiny: Path, tmp_path: Path, english: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"calibration": english, "samples": 4, "length": 64}
    whole = fewbits.quantize(tiny, tmp_path / "whole", "int4-g32", **options).path
    real, solve, puts, calls = Store.put, solvers.solve_and_measure, [], []

    def dies_at_the_ninth(*args: object) -> object:
        puts.append(1)
        if len(puts) == 9:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Store, "put", dies_at_the_ninth)
    with pytest.raises(KeyboardInterrupt):
        fewbits.quantize(tiny, tmp_path / "killed", "int4-g32", **options)
    assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(Store, "put", lambda *args: (puts.append(1), real(*args))[1])
    monkeypatch.setattr(solvers, "solve_and_measure", lambda *args: (calls.append(1), solve(*args))[1])
    puts.clear()
    again = fewbits.quantize(tiny, tmp_path / "killed", "int4-g32", **options).path
    assert len(puts) == 14 - 8, "eight of fourteen matrices were kept"
    assert len(calls) == 8 - 4, "of q, k, v the first was there: they were solved together again"
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_override_and_notes(tiny: Path, tmp_path: Path) -> None:
    result = fewbits.quantize(tiny, tmp_path / "a.gguf", "Q4_0", overrides=["*.down_proj.weight=f16"])
    kinds = {t["name"].split(".")[-2]: t["codec"] for t in result.tensors}
    assert kinds["down_proj"] == "F16" and kinds["q_proj"] == "Q4_0"
    assert any("down_proj" in n or "override" in n for n in result.notes)


def test_quantizing_twice_says_so(tiny: Path, tmp_path: Path) -> None:
    fewbits.quantize(tiny, tmp_path / "a.gguf", "Q8_0")
    result = fewbits.quantize(tmp_path / "a.gguf", tmp_path / "b", "nf4")
    assert any("quantized before (Q8_0)" in n for n in result.notes)


# what nobody has to decide ------------------------------------------------------------------------------------------
def solvers_of(result: Any) -> set[str]:
    return {t["solver"] for t in result.tensors if t["solver"]}


def test_integer_layouts_calibrate_on_the_models_own_text(tiny: Path, tmp_path: Path) -> None:
    result = fewbits.quantize(tiny, tmp_path / "out", "int4-g32", samples=2, length=32)
    assert solvers_of(result) == {"gptq"} and result.calibration and result.calibration.startswith("self")
    assert f"calibrated on {result.calibration}" in result.notes


@pytest.mark.parametrize("to, options", [
    ("int4-g32", {"solver": "search"}), ("int4-g32", {"calibration": "none"}), ("int8-g32", {}), ("nf4", {}),
    ("int4-g32", {"container": "fewbits"}), ("Q4_0", {})])
def test_nothing_else_is_calibrated_unasked(to: str, options: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    result = fewbits.quantize(tiny, tmp_path / RECIPES.get(to, "a"), to, **options)
    assert solvers_of(result) == {"search"} and result.calibration is None


def test_without_a_tokenizer_the_default_gives_way_and_says_so(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, model)
    result = fewbits.quantize(model, tmp_path / "out", "int4-g32", samples=2, length=32)
    assert solvers_of(result) == {"search"} and result.calibration is None
    assert any(n.startswith("searched, not calibrated on the model's own text: ") for n in result.notes)
    with pytest.raises(FewbitsError, match="no tokenizer"):
        fewbits.quantize(model, tmp_path / "asked", "int4-g32", calibration="self")


@pytest.mark.parametrize("to, options, said", [
    ("Q4_0", {}, True), ("Q8_0", {}, False), ("Q4_0", {"solver": "search"}, False),
    ("Q4_0", {"calibration": "none"}, False), ("nf4", {}, False)])
def test_what_calibration_would_add_is_said_where_it_adds(to: str, options: dict[str, str], said: bool, tiny: Path,
                                                          tmp_path: Path) -> None:
    """Blocks of nf4 cross the rows of this model: nothing is gained there."""
    result = fewbits.quantize(tiny, tmp_path / "a.gguf" if to[0] == "Q" else tmp_path / "a", to, **options)
    assert said == any("--calibration self" in note for note in result.notes)


# bad input ----------------------------------------------------------------------------------------------------------
def broken(tiny: Path, to: Path, value: float) -> Path:
    shutil.copytree(tiny, to)
    weights = load_file(to / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_weights_are_named_and_refused(value: float, tiny: Path, tmp_path: Path) -> None:
    model = broken(tiny, tmp_path / "broken", value)
    with pytest.raises(FewbitsError, match=r"layers\.1\.mlp\.up_proj\.weight has 1 values that are NaN or infinite"):
        fewbits.quantize(model, tmp_path / "out", "nf4")
    assert not (tmp_path / "out").exists()


def test_nonfinite_weights_are_kept_when_asked(tiny: Path, tmp_path: Path) -> None:
    model = broken(tiny, tmp_path / "broken", float("nan"))
    result = fewbits.quantize(model, tmp_path / "out", "nf4", keep_nonfinite=True)
    kinds = {t["name"]: t["codec"] for t in result.tensors}
    assert kinds["model.layers.1.mlp.up_proj.weight"] == "F32" and kinds["model.layers.0.mlp.up_proj.weight"] == "nf4"
    assert any("NaN or infinite: kept as F32" in n for n in result.notes)


def test_values_beyond_half_precision_are_refused(tiny: Path, tmp_path: Path) -> None:
    model = broken(tiny, tmp_path / "large", 1e6)
    with pytest.raises(FewbitsError, match="up_proj.weight holds 1e.06, float16 ends at 65504"):
        fewbits.quantize(model, tmp_path / "out", "f16")
    assert not (tmp_path / "out").exists()


def test_output_that_is_the_input_or_exists(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="output and input are the same"):
        fewbits.quantize(tiny, tiny, "nf4")
    (tmp_path / "there").mkdir()
    with pytest.raises(FewbitsError, match="exists already"):
        fewbits.quantize(tiny, tmp_path / "there", "nf4")
    with pytest.raises(FewbitsError, match="no such directory"):
        fewbits.quantize(tiny, tmp_path / "no" / "where", "nf4")


def test_no_space(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(FewbitsError, match="GB needed, 0.00 GB free"):
        fewbits.quantize(tiny, tmp_path / "out", "nf4")


def test_too_little_calibration_text(tiny: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Hello.")
    with pytest.raises(FewbitsError, match="6 tokens of text, one sequence needs"):
        fewbits.quantize(tiny, tmp_path / "out", "int4-g32", calibration=short)
    for solver in ("gptq", "gptq-act-order"):
        with pytest.raises(FewbitsError, match=f"{solver} needs calibration text"):
            fewbits.quantize(tiny, tmp_path / "out", "int4-g32", solver=solver)
    with pytest.raises(FewbitsError, match="transform awq needs calibration text"):
        fewbits.quantize(tiny, tmp_path / "out", "nf4", transform="awq")


@pytest.mark.parametrize("to, container", [("int4-g32", "awq"), ("int4-g32", "compressed-tensors"), ("Q4_0", "gguf")])
def test_only_some_containers_take_columns_in_another_order(to: str, container: str, tiny: Path, tmp_path: Path,
                                                            english: Path) -> None:
    with pytest.raises(FewbitsError, match=f"{container} cannot hold .*_proj.weight by gptq-act-order") as caught:
        fewbits.quantize(tiny, tmp_path / "out.gguf", to, container=container, solver="gptq-act-order",
                         calibration=english)
    assert "--container gptq" in (caught.value.hint or "") and not list(tmp_path.iterdir())


def test_act_order_goes_through_the_store_to_the_file(tiny: Path, tmp_path: Path, english: Path) -> None:
    options = {"solver": "gptq-act-order", "calibration": english, "samples": 4, "length": 64}
    out = fewbits.quantize(tiny, tmp_path / "out", "int4-g32", **options).path
    entries = containers.open(out).entries
    order = entries["model.layers.1.self_attn.q_proj.weight"].load().order
    assert order is not None and sorted(order.tolist()) == list(range(96)) and order.tolist() != list(range(96))


def test_a_file_that_reads_back_differently_is_not_kept(tiny: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    target = type(containers.by_name("bitsandbytes"))
    real = target.stage

    def damaged(self: object, path: Path, *rest: object) -> None:
        real(self, path, *rest)
        file = path / "model.safetensors"
        weights = load_file(file)
        weights["model.layers.1.mlp.up_proj.weight"][7] ^= 0x15
        save_file(weights, file, metadata={"format": "pt"})

    monkeypatch.setattr(target, "stage", damaged)
    with pytest.raises(FewbitsError, match="reads back with other values"):
        fewbits.quantize(tiny, tmp_path / "out", "nf4")
    assert [p.name for p in tmp_path.iterdir() if "work" not in p.name] == []


def test_result_is_json(tiny: Path, tmp_path: Path) -> None:
    result = fewbits.quantize(tiny, tmp_path / "out", "nf4")
    assert json.loads(json.dumps(result.to_json()))["recipe"] == "nf4"


@pytest.mark.parametrize(("recipe", "name"), [("f16", "float16"), ("bf16", "bfloat16"), ("f32", "float32")])
def test_the_configuration_names_the_type_of_the_weights(tiny: Path, tmp_path: Path, recipe: str, name: str) -> None:
    out = fewbits.quantize(tiny, tmp_path / "out", recipe).path
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert str(loaded.dtype) == f"torch.{name}"
