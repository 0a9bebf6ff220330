"""`collect` against hooks on the Transformers model, and what `Imatrix.statistics` makes of a matrix."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from fewbits import arch, containers, imatrix
from fewbits.arch import rows
from fewbits.calibration.sources import Calibration
from fewbits.checkpoint import Checkpoint
from fewbits.codecs.floats import F32
from fewbits.containers import experts
from fewbits.containers.gguf import Gguf
from fewbits.errors import FewbitsError
from fewbits.imatrix import Imatrix, Sums
from fewbits.qtensor import QTensor
from tests.arch.models import MODELS, VOCAB, directory, tiny

# Transformers' name of a layer's module -> what GGUF calls it; by hand, not from our tables
LLAMA = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}
NAMES = {"llama": LLAMA, "gpt2": {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up",
                                  "mlp.c_proj": "ffn_down"},
         "gpt_neox": {"attention.query_key_value": "attn_qkv", "attention.dense": "attn_output",
                      "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"},
         "phi3": {"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up",
                  "mlp.down_proj": "ffn_down"}}


def hooked(model: transformers.PreTrainedModel, batches: list[dict], names: dict[str, str]) -> dict[str, np.ndarray]:
    """Sums of squares `[in]` by GGUF's names, in float64, the whole model at once."""
    found: dict[str, np.ndarray] = {}

    def hook(name: str):
        def see(module, inputs):
            x = inputs[0].double().reshape(-1, inputs[0].shape[-1])
            found[name] = found.get(name, 0) + (x ** 2).sum(0).numpy()
        return see

    for full, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            match = re.search(r"\.(\d+)\.(.+)", full)
            name = f"blk.{match[1]}.{names[match[2]]}.weight" if match else "output.weight"
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return found


def text(samples: int, length: int, vocabulary: int = VOCAB, seed: int = 1) -> Calibration:
    tokens = torch.randint(3, vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))
    return Calibration([{"input_ids": row[None]} for row in tokens], f"random, {samples} x {length} tokens")


def agree(ours: Imatrix, theirs: dict[str, np.ndarray], tokens: int) -> None:
    assert ours.entries.keys() == theirs.keys()
    for name, wanted in theirs.items():
        sums = ours.entries[name]
        assert sums.counts.tolist() == [tokens] and sums.sums.shape == (1, len(wanted)), name
        assert np.abs(sums.sums[0] - wanted).max() <= 1e-4 * wanted.max(), name


@pytest.mark.parametrize("name", NAMES)
def test_sums_are_those_of_hooks(name: str, tmp_path: Path) -> None:
    model = tiny(MODELS[name])
    source = containers.open(directory(model, tmp_path / "m"))
    batches = text(3, 40)
    reports: list[tuple[str, int, int]] = []
    ours = imatrix.collect(source, batches, lambda *r: reports.append(r), head=True)
    theirs = hooked(model, batches.batches, NAMES[name])
    if name == "gpt2":
        theirs.pop("output.weight")  # tied: there is no tensor of that name
    agree(ours, theirs, 120)
    assert (ours.chunks, ours.chunk_size, ours.datasets) == (3, 40, ["random, 3 x 40 tokens"])
    assert reports == [("collecting", i, 2) for i in range(2)]


def test_a_real_model(shared) -> None:
    folder = shared("models/stories260k")
    source = containers.open(folder)
    batches = text(2, 64, 500)
    ours = imatrix.collect(source, batches)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = hooked(model, batches.batches, LLAMA)
    theirs.pop("output.weight", None)  # without `head`, the head is left out
    agree(ours, theirs, 128)


def test_padding_does_not_count(tmp_path: Path) -> None:
    model = tiny(MODELS["llama"])
    source = containers.open(directory(model, tmp_path / "m"))
    ids = text(1, 30).batches[0]["input_ids"]
    padded = torch.cat([ids, torch.zeros(1, 10, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 10, dtype=torch.long)], 1)
    whole = imatrix.collect(source, Calibration([{"input_ids": ids}], ""))
    short = imatrix.collect(source, Calibration([{"input_ids": padded, "attention_mask": mask}], ""))
    for name, sums in whole.entries.items():
        assert short.entries[name].counts.tolist() == [30]
        assert np.allclose(short.entries[name].sums, sums.sums, rtol=1e-3, atol=1e-5 * sums.sums.max()), name


def naive_experts(model: transformers.PreTrainedModel, ids: torch.Tensor) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Of a Mixtral: what each expert's matrices read, token by token."""
    calls = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda m, args: calls.append((m, *args)))
    with torch.no_grad():
        model(input_ids=ids)
    found = {}
    for i, (module, x, chosen, _) in enumerate(calls):
        count, hidden, inner = len(module.down_proj), x.shape[-1], module.down_proj.shape[-1]
        up, down, seen = np.zeros((count, hidden)), np.zeros((count, inner)), [0] * count
        for token, picked in zip(x.reshape(-1, hidden), chosen.reshape(len(x.reshape(-1, hidden)), -1), strict=True):
            for e in picked.tolist():
                gate, value = (module.gate_up_proj[e] @ token).chunk(2)
                h = torch.nn.functional.silu(gate) * value
                up[e] += token.double().numpy() ** 2
                down[e] += h.detach().double().numpy() ** 2
                seen[e] += 1
        found[f"blk.{i}.ffn_gate_exps.weight"] = found[f"blk.{i}.ffn_up_exps.weight"] = up, seen
        found[f"blk.{i}.ffn_down_exps.weight"] = down, seen
    return found


def test_experts_have_sums_of_their_own(tmp_path: Path) -> None:
    model = tiny(MODELS["mixtral"])
    source = containers.open(directory(model, tmp_path / "m"))
    batch = text(1, 5)  # too few for each expert to see one
    ours = imatrix.collect(source, batch)
    for name, (sums, seen) in naive_experts(model, batch.batches[0]["input_ids"]).items():
        assert ours.entries[name].counts.tolist() == seen
        assert np.allclose(ours.entries[name].sums, sums, rtol=1e-4, atol=1e-5 * sums.max()), name
    assert ours.unseen and "blk.0.attn_q.weight" not in ours.unseen
    name = ours.unseen[0]
    unseen = int(np.argmin(ours.entries[name].counts))
    assert ours.entries[name].mean[unseen].tolist() == [1] * ours.entries[name].sums.shape[1]
    stack = next(t.hf for t in arch.tensors(arch.lookup(source.config), source.config) if t.gguf == name)
    found = ours.statistics(source)
    assert torch.equal(found[experts.one(stack, unseen)].values, found[stack].values[unseen])
    assert torch.equal(found[stack].values, torch.from_numpy(ours.entries[name].mean))


def test_activations_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = tiny(MODELS["llama"])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    source = containers.open(directory(model, tmp_path / "m"))
    with pytest.raises(FewbitsError, match=r"entering model\.layers\.1\.mlp\.down_proj\.weight are not finite"):
        imatrix.collect(source, text(1, 20))


# from a matrix to a model's tensors -----------------------------------------------------------------------------------
@pytest.fixture
def llama(tmp_path: Path) -> tuple[Checkpoint, Imatrix]:
    source = containers.open(directory(tiny(MODELS["llama"]), tmp_path / "m"))
    return source, imatrix.collect(source, text(2, 30))


@pytest.mark.parametrize("name", MODELS)
def test_no_row_of_a_table_moves_columns(name: str) -> None:
    """Else importances would have to be moved too, between GGUF's tensors and Transformers'."""
    config = MODELS[name].to_dict()
    family = arch.lookup(config)
    config = arch.complete(family, config)
    checked = 0
    for tensor in arch.tensors(family, config):
        shape = tensor.shape(config)
        if len(shape) < 2 or tensor.role == "bias":
            continue
        columns = torch.arange(shape[-1], dtype=torch.float32).expand(shape).contiguous()
        moved = rows.apply(tensor.ops, QTensor(F32, shape, {"data": columns.view(F32.matrix(shape))})).dequantize()
        assert torch.equal(moved, torch.arange(shape[-1], dtype=torch.float32).expand(moved.shape)), tensor.hf
        checked += 1
    assert checked > 5


@pytest.mark.parametrize("name", ["i.gguf", "i.dat"])
def test_a_file_means_what_was_collected(name: str, llama, tmp_path: Path) -> None:
    source, collected = llama
    imatrix.write(tmp_path / name, collected)
    got, meant = imatrix.read(tmp_path / name).statistics(source), collected.statistics(source)
    assert got.keys() == meant.keys() == {n for n in source.entries if "proj.weight" in n}
    assert all(torch.allclose(got[n].values, meant[n].values, rtol=1e-6) for n in got)


def test_one_for_the_model_fits_its_gguf_too(llama, tmp_path: Path) -> None:
    source, collected = llama
    containers.write(Gguf(), tmp_path / "m.gguf", source)
    again = imatrix.collect(containers.open(tmp_path / "m.gguf"), text(2, 30))
    assert again.statistics(source).keys() == collected.statistics(source).keys()
    for name, sums in collected.entries.items():
        assert np.allclose(again.entries[name].sums, sums.sums, rtol=1e-4), name


def test_experts_in_a_row_as_the_old_kind_has_them(tmp_path: Path) -> None:
    source = containers.open(directory(tiny(MODELS["qwen3_moe"]), tmp_path / "m"))
    collected = imatrix.collect(source, text(2, 40))
    imatrix.write(tmp_path / "i.dat", collected)
    found = imatrix.read(tmp_path / "i.dat")
    assert found.entries["blk.0.ffn_up_exps.weight"].sums.shape == (1, 8 * 64)
    got, meant = found.statistics(source), collected.statistics(source)
    stack = "model.layers.0.mlp.experts.up_proj.weight"
    assert got[stack].values.shape == (8, 64)
    assert all(torch.allclose(got[n].values, meant[n].values, rtol=1e-6) for n in meant)


def test_what_is_absent_has_no_statistics(llama) -> None:
    source, collected = llama
    without = replace(collected, entries={k: v for k, v in collected.entries.items() if k != "blk.1.attn_v.weight"})
    gone = collected.statistics(source).keys() - without.statistics(source).keys()
    assert gone == {"model.layers.1.self_attn.v_proj.weight"}


def test_another_model_is_named(llama, tmp_path: Path) -> None:
    source, collected = llama
    entries = collected.entries
    wide = entries | {"blk.0.ffn_down.weight": Sums(np.ones((1, 99), np.float32), np.array([5]))}
    cases = [
        (wide, r"another model: blk\.0\.ffn_down\.weight has 99 inputs, .*m has 96"),
        (entries | {"blk.2.ffn_down.weight": entries["blk.1.ffn_down.weight"]}, r"has no tensor blk\.2\.ffn_down\.wei"),
        ({k: v for k, v in entries.items() if ".1." not in k}, r"it has 1 layers, .*m has 2 \(layer 1 is missing\)"),
    ]
    for found, message in cases:
        with pytest.raises(FewbitsError, match=message) as error:
            Imatrix(found, path=tmp_path / "i.gguf").statistics(source)
        assert str(error.value).startswith(f"{tmp_path / 'i.gguf'}: statistics of another model")


def test_families_without_names_are_refused(tmp_path: Path) -> None:
    model = transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32))
    model.save_pretrained(tmp_path / "opt")
    source = containers.open(tmp_path / "opt")
    with pytest.raises(FewbitsError, match="opt: importance matrices name tensors as GGUF does; .*OPT"):
        imatrix.collect(source, text(1, 20, 64))
    with pytest.raises(FewbitsError, match="importance matrices name tensors as GGUF does"):
        Imatrix({}).statistics(source)
