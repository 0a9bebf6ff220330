"""Models with experts from end to end: every container loads, GPTQ calibrates what it sees, MXFP4 is never decoded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

import fewbits
from fewbits import arch, codecs, containers, planning, solvers
from fewbits.arch import rows
from fewbits.checkpoint import Entry
from fewbits.codecs.floats import F32
from fewbits.containers import base, gguf_file
from fewbits.containers.gguf import Gguf
from fewbits.containers.gguf_file import Spec, Value
from fewbits.containers.mxfp4 import Mxfp4
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.quantizing import quantize
from fewbits.recipe import ModelFacts, get
from tests.arch.models import MODELS, SMALL, VOCAB, directories, directory
from tests.arch.models import tiny as small

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")
EXPERTS = {"mixtral": "model.layers.0.block_sparse_moe.experts.", "qwen3_moe": "model.layers.0.mlp.experts.",
           "gpt_oss": "model.layers.0.mlp.experts."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    """Directories of the three families, with a tokenizer."""
    return directories(MODELS, tmp_path_factory, tiny)


def error(path, wanted) -> float:
    """Mean square of the difference of two models' logits, over that of `wanted`'s."""
    tokens = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (fewbits.load(p, kernel="decoded")(tokens).logits for p in (path, wanted))
    return float(((a - b) ** 2).sum() / (b ** 2).sum())


# recipes and containers ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["Q8_0", "int8-g32", "int8", "nf4", "nf4-dq", "fp8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_container_holds_experts(name, recipe, folder, tmp_path):
    result = quantize(folder(name), tmp_path / "out", recipe, container="fewbits" if recipe == "fp8" else None)
    back = containers.open(tmp_path / "out")
    assert error(tmp_path / "out", folder(name)) < (0.1 if recipe.startswith("nf4") else 0.01)
    kinds = {e.codec.name for e in back.entries.values() if e.name.startswith(EXPERTS[name]) and "bias" not in e.name}
    fused = name == "gpt_oss" and result.container in ("gptq", "bitsandbytes")
    assert kinds == {"F32" if fused else codecs.get(recipe).name}
    assert fused == any("no layout for experts fused in one tensor" in note for note in result.notes)


@pytest.mark.parametrize("recipe", ["Q4_K_M", "Q8_0", "int4-g32", "nf4-dq", "fp8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_plans_know_the_size(name, recipe, folder, tmp_path):
    quantize(folder(name), tmp_path / "out", recipe, calibration="none")
    out = tmp_path / "out"
    real = sum(f.stat().st_size for f in out.iterdir()) if out.is_dir() else out.stat().st_size
    planned = planning.plan(folder(name), recipes=[recipe]).rows[0]
    assert not planned.reason
    assert abs(planned.file_bytes - real) <= 0.01 * real


@pytest.mark.parametrize("recipe, name", [("int4-g32", "mixtral"), ("int4-g32", "qwen3_moe"), ("Q4_0", "gpt_oss")])
def test_gptq_calibrates_what_it_sees(recipe, name, folder, english, tmp_path):
    result = quantize(folder(name), tmp_path / "out", recipe, calibration=english, samples=4, length=64)
    solved = {t["name"]: t for t in result.tensors if t["solver"] and ".layers." in t["name"]}
    assert {t["solver"] for t in solved.values()} == {"gptq"}
    assert {t["error_of"] for t in solved.values()} == {"outputs"}
    assert sum(".experts." in n for n in solved) == (4 if name == "gpt_oss" else 6)


def test_experts_of_models_outside_the_table(tmp_path, tiny):
    config = transformers.OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2)
    source = directory(small(config), tmp_path / "m", tiny)
    result = quantize(source, tmp_path / "int4", "int4-g32", calibration="none")
    kinds = {t["name"]: t["codec"] for t in result.tensors}
    assert kinds["model.layers.0.mlp.experts.gate_proj.weight"] == "int4-g32"
    assert kinds["model.layers.0.mlp.gate.weight"] == "F32"
    assert error(tmp_path / "int4", source) < 0.1
    again = quantize(tmp_path / "int4", tmp_path / "nf4", "nf4-dq")
    assert {t["codec"] for t in again.tensors if ".experts." in t["name"]} == {"nf4-dq"}
    third = quantize(tmp_path / "nf4", tmp_path / "fp8", "fp8", container="fewbits")
    assert {t["codec"] for t in third.tensors if ".experts." in t["name"]} == {"fp8-e4m3"}


def test_roles_and_mixes():
    facts = ModelFacts.from_config(MODELS["mixtral"].to_dict() | {"architectures": ["MixtralForCausalLM"]})
    roles = {f.name.split("model.layers.0.block_sparse_moe.")[-1]: (f.role, f.shape) for f in facts.tensors}
    assert roles["gate.weight"] == ("ffn_gate_inp", (4, 64))
    assert roles["experts.w1.weight"] == ("ffn_gate", (4, 96, 64))
    assert roles["experts.w2.weight"] == ("ffn_down", (4, 64, 96))
    chosen = {c.name: c for c in get("Q8_0").resolve(facts)}
    assert chosen["model.layers.0.block_sparse_moe.gate.weight"].codec == F32  # llama.cpp leaves routers alone
    apart = [c.name for c in get("nf4-dq").resolve(facts) if "layers.0.block_sparse_moe.experts" in c.name]
    assert len(apart) == 12 and "model.layers.0.block_sparse_moe.experts.3.w1.weight" in apart
    assert facts.experts == 4


def test_a_part_of_the_experts_is_not_enough(folder):
    source = containers.open(folder("qwen3_moe"))
    entries = {n: e for n, e in source.entries.items() if n != EXPERTS["qwen3_moe"] + "up_proj.weight"}
    with pytest.raises(FewbitsError, match=r"a part of model.layers.0.mlp.experts.gate_up_proj is missing"):
        fewbits.load(replace(source, entries=entries))
    wrong = source.entries[EXPERTS["qwen3_moe"] + "up_proj.weight"].as_(shape=(8, 64, 32))
    with pytest.raises(FewbitsError, match=r"up_proj.weight is \[8, 64, 32\], the configuration wants \[8, 32, 64\]"):
        fewbits.load(replace(source, entries=source.entries | {wrong.name: wrong}))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_apart_in_their_codec_are_stacked_in_floats(name, folder, tmp_path):
    quantize(folder(name), tmp_path / "nf4", "nf4-dq")
    assert EXPERTS[name] + "0." in " ".join(containers.open(tmp_path / "nf4").entries)
    for out in ("floats", "m.gguf"):
        fewbits.convert(tmp_path / "nf4", tmp_path / out, "f32")
        assert EXPERTS[name] + "0." not in " ".join(containers.open(tmp_path / out).entries)
        assert error(tmp_path / out, tmp_path / "nf4") < 1e-9


# GGUF ---------------------------------------------------------------------------------------------------------------
def test_mixtral_and_llama_are_told_apart(folder, tmp_path):
    containers.write(Gguf(), tmp_path / "m.gguf", containers.open(folder("mixtral")))
    file = gguf_file.read(tmp_path / "m.gguf")
    assert file.metadata["general.architecture"].value == "llama"
    assert file.metadata["llama.expert_count"] == Value("UINT32", 4)
    assert file.metadata["llama.expert_used_count"] == Value("UINT32", 2)
    assert file.tensors["blk.0.ffn_gate_exps.weight"].shape == (4, 96, 64)
    assert containers.open(tmp_path / "m.gguf").architecture == "MixtralForCausalLM"
    assert arch.by_gguf("llama").name == "llama" and arch.by_gguf("llama", experts=True).name == "mixtral"


def test_mixtral_files_with_a_tensor_an_expert_are_read(folder, tmp_path):
    source = containers.open(folder("mixtral"))
    containers.write(Gguf(), tmp_path / "new.gguf", source)
    new = gguf_file.read(tmp_path / "new.gguf")
    specs, data = [], []
    for spec in new.tensors.values():
        stem, stack, _ = spec.name.partition("_exps")
        whole = new.data(spec).reshape(spec.shape[0] if stack else 1, -1)
        for i, part in enumerate(whole):
            specs.append(Spec(f"{stem}.{i}.weight", spec.shape[1:], spec.type) if stack else spec)
            data.append(part)
    gguf_file.write(tmp_path / "old.gguf", new.metadata, specs, data)
    old = containers.open(tmp_path / "old.gguf")
    base.compare(old, source)
    assert {n: e.shape for n, e in old.entries.items()} == {n: e.shape for n, e in source.entries.items()}


@pytest.mark.parametrize("changes, reason", [
    ({"norm_topk_prob": False}, "norm_topk_prob is false"),
    ({"mlp_only_layers": [0]}, "some of its layers have no experts"),
    ({"attention_bias": True}, "attention_bias is set")])
def test_what_gguf_cannot_say_of_qwen3_moe(changes, reason, folder):
    source = containers.open(folder("qwen3_moe"))
    refused = replace(source, config=source.config | changes)
    assert reason in Gguf().refuses(refused, next(iter(source.entries.values())))


@pytest.mark.parametrize("changes, reason", [
    ({"swiglu_limit": 8.0}, "swiglu_limit is 8.0"), ({"layer_types": ["full_attention"] * 2}, "in turns"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn without truncate = False"),
    ({"rope_parameters": {"rope_type": "yarn", "truncate": False, "beta_fast": 8.0}}, "beta_fast = 8.0")])
def test_what_gguf_cannot_say_of_gpt_oss(changes, reason, folder):
    source = containers.open(folder("gpt_oss"))
    refused = replace(source, config=source.config | changes)
    assert reason in Gguf().refuses(refused, next(iter(source.entries.values())))


# gpt-oss ------------------------------------------------------------------------------------------------------------
def test_mxfp4_travels_without_being_decoded(folder, tmp_path):
    source = containers.open(folder("gpt_oss"))
    codec, entries = codecs.get("MXFP4"), {}
    for name, entry in source.entries.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            q = solvers.solve(entry.load().dequantize(), codec, "nearest")
            entry = Entry(name, entry.shape, codec, lambda q=q: q)
        entries[name] = entry
    first = containers.write(Mxfp4(), tmp_path / "openai", replace(source, entries=entries))
    second = containers.write(Gguf(), tmp_path / "m.gguf", first)
    third = containers.write(Mxfp4(), tmp_path / "again", second)
    packed = [n for n, e in first.entries.items() if e.codec == codec]
    assert len(packed) == 4
    for name in packed:
        blocks = [c.entries[name].load().planes["blocks"] for c in (first, second, third)]
        assert torch.equal(blocks[0], blocks[1]) and torch.equal(blocks[0], blocks[2])
    assert ((tmp_path / "openai/model.safetensors").read_bytes()
            == (tmp_path / "again/model.safetensors").read_bytes())
    spec = gguf_file.read(tmp_path / "m.gguf").tensors["blk.0.ffn_up_exps.weight"]
    assert (spec.type, spec.shape) == ("MXFP4", (4, 96, 64))


def test_parts_of_one_tensor_must_be_of_one_type(folder, tmp_path):
    containers.write(Gguf(), tmp_path / "m.gguf", containers.open(folder("gpt_oss")))
    file = gguf_file.read(tmp_path / "m.gguf")
    specs = [replace(s, type="F16") if s.name == "blk.0.ffn_up_exps.weight" else s for s in file.tensors.values()]
    data = [file.data(s)[:s.nbytes // 2] if s.name == "blk.0.ffn_up_exps.weight" else file.data(s)
            for s in file.tensors.values()]
    gguf_file.write(tmp_path / "bad.gguf", file.metadata, specs, data)
    with pytest.raises(FewbitsError, match=r"ffn_gate_exps.weight' is F32 .*ffn_up_exps.weight' F16 .*parts of one"):
        containers.open(tmp_path / "bad.gguf")


# rows ---------------------------------------------------------------------------------------------------------------
def test_rows_in_turns_by_hand():
    w = torch.arange(2 * 4 * 1.0).view(2, 4, 1)
    q = QTensor(F32, (2, 4, 1), {"data": w.view(8, 1)})
    gate, up = (rows.Every(i, 2, axis=-2) for i in (0, 1))
    assert gate.apply(q).dequantize().flatten().tolist() == [0, 2, 4, 6]
    assert up.apply(q).dequantize().flatten().tolist() == [1, 3, 5, 7]
    assert gate.shape((2, 4, 1)) == (2, 2, 1) and gate.whole((2, 2, 1)) == (2, 4, 1)
    joined = rows.join([((up,), up.apply(q)), ((gate,), gate.apply(q))])  # in any order
    assert torch.equal(joined.dequantize(), w)
    bias = QTensor(F32, (2, 4), {"data": w.view(2, 4)})
    assert rows.Every(1, 2, axis=-1).apply(bias).dequantize().tolist() == [[1, 3], [5, 7]]
    with pytest.raises(ValueError, match="3 rows do not divide into 2 parts"):
        gate.shape((2, 3, 1))
    with pytest.raises(ValueError, match="cannot be taken without decoding"):
        rows.Every(1, 2, axis=-1).apply(solvers.solve(torch.randn(2, 64), codecs.get("Q8_0"), "nearest"))


@pytest.mark.parametrize("name", ["Q4_K", "MXFP4", "int4-g32", "kmeans4"])
def test_packed_rows_in_turns(name):
    w = torch.randn(3, 6, 256, generator=torch.Generator().manual_seed(0))
    q = solvers.solve(w, codecs.get(name), "nearest")
    parts = [((rows.Every(i, 2, axis=-2),), rows.Every(i, 2, axis=-2).apply(q)) for i in (0, 1)]
    for i, (_, part) in enumerate(parts):
        assert torch.equal(part.dequantize(), q.dequantize()[:, i::2])
    back = rows.join(parts)
    assert back.shape == q.shape and all(torch.equal(back.planes[k], q.planes[k]) for k in q.planes)
