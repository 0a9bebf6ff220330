"""Experts: one tensor a projection in a checkpoint, one an expert in directories; nothing decoded, nothing lost."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from fewbits import codecs, containers, solvers
from fewbits.checkpoint import Entry
from fewbits.codecs.floats import F32
from fewbits.containers import base, experts
from fewbits.containers.directory import TransformersDirectory
from fewbits.containers.gptq import Gptq
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from tests.codecs.registry import ALL as NAMES

LAYER = "model.layers.0.mlp."
GATE = LAYER + "experts.{}.gate_proj.weight"
ALL = LAYER + "experts.gate_proj.weight"


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def floats(name: str, w: torch.Tensor) -> Entry:
    shape = tuple(w.shape)
    return Entry(name, shape, F32, lambda: QTensor(F32, shape, {"data": w.reshape(F32.matrix(shape))}))


def directory(path, tensors: dict[str, torch.Tensor]):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["XForCausalLM"], "model_type": "x"}))
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


# packed tensors -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_a_stack_is_its_experts(name):
    codec, w = codecs.get(name), draw(3, 4, 512)
    if not codec.stacks(tuple(w.shape)) or codec.check(tuple(w.shape)):
        pytest.skip("experts stay apart")
    apart = [solvers.solve(expert, codec, "nearest") for expert in w]
    stack = experts.stack(apart)
    together = solvers.solve(w, codec, "nearest")
    assert stack.shape == together.shape == (3, 4, 512)
    planes = codec.planes(stack.shape)
    assert {k: tuple(p.shape) for k, p in stack.planes.items()} == {k: size for k, (_, size) in planes.items()}
    torch.testing.assert_close(stack.dequantize(), together.dequantize(), rtol=1e-5, atol=1e-5)
    assert torch.equal(stack.dequantize(), torch.stack([q.dequantize() for q in apart]))
    for i, q in enumerate(apart):
        back = experts.expert(stack, i)
        assert back.shape == q.shape and all(torch.equal(back.planes[k], q.planes[k]) for k in q.planes)


def test_blocks_that_cross_experts_do_not_stack():
    assert codecs.get("nf4").stacks((3, 2, 32)) and codecs.get("nf4").stacks((3, 1, 128))
    assert not codecs.get("nf4").stacks((3, 1, 32))
    assert not codecs.get("nf4-dq").stacks((3, 4, 64))  # one offset a tensor
    # two experts of 58 weights take as many blocks as the two together, and are not cut alike
    assert not codecs.get("nf4").stacks((2, 1, 58))


def test_column_orders_are_kept_expert_by_expert():
    codec, w = codecs.get("int4-g32"), draw(2, 4, 64)
    orders = [torch.randperm(64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    apart = [replace(solvers.solve(expert[:, order], codec, "nearest"), order=order)
             for expert, order in zip(w, orders, strict=True)]
    stack = experts.stack(apart)
    assert torch.equal(stack.dequantize(), torch.stack([q.dequantize() for q in apart]))
    assert torch.equal(stack.part(slice(3, 6)).dequantize(), stack.dequantize().view(8, 64)[3:6])
    assert torch.equal(experts.expert(stack, 1).order, orders[1])
    mixed = experts.stack([apart[0], replace(apart[1], order=None)])
    assert torch.equal(mixed.dequantize()[0], apart[0].dequantize())


# entries ------------------------------------------------------------------------------------------------------------
def test_stacked_and_apart_again():
    w = draw(3, 4, 8)
    entries = {e.name: e for e in [floats("a", w[0]), *(floats(GATE.format(i), w[i]) for i in (0, 1, 2)),
                                   floats(LAYER + "experts.1.gate_proj.bias", w[1, 0]),
                                   floats(LAYER + "experts.0.gate_proj.bias", w[0, 0]),
                                   floats(LAYER + "shared_expert.gate_proj.weight", w[2])]}
    stacked = experts.stacked(entries)
    assert {n: e.shape for n, e in stacked.items()} == {
        "a": (4, 8), ALL: (3, 4, 8), LAYER + "experts.gate_proj.bias": (2, 8),
        LAYER + "shared_expert.gate_proj.weight": (4, 8)}
    assert list(stacked) == ["a", ALL, LAYER + "experts.gate_proj.bias", LAYER + "shared_expert.gate_proj.weight"]
    assert torch.equal(stacked[ALL].load().dequantize(), w)
    assert torch.equal(stacked[LAYER + "experts.gate_proj.bias"].load().dequantize(), w[:2, 0])
    apart = experts.unstacked(stacked.values())
    assert apart == entries


def test_an_expert_missing_among_its_neighbours_is_named():
    entries = {GATE.format(i): floats(GATE.format(i), draw(4, 8)) for i in (0, 2)}
    with pytest.raises(FewbitsError, match=r"experts\.1\.gate_proj\.weight is missing, where there is .*experts\.2\."):
        experts.stacked(entries)


@pytest.mark.parametrize("number", ["01", "-1", "1" * 5000, "\u0661"])
def test_odd_numbers_are_no_experts(number):
    entries = {n: floats(n, draw(4, 8)) for n in (GATE.format("0"), GATE.format("1"), GATE.format(number))}
    assert experts.stacked(entries).keys() == {ALL, GATE.format(number)}


@pytest.mark.parametrize("other", ["codec", "shape"])
def test_experts_that_differ_stay_apart(other):
    entries = {GATE.format(i): floats(GATE.format(i), draw(4, 8)) for i in range(2)}
    changes = {"codec": codecs.get("BF16")} if other == "codec" else {"shape": (8, 4)}
    entries[GATE.format(1)] = entries[GATE.format(1)].as_(**changes)
    assert experts.stacked(entries) == entries


def test_a_stack_is_loaded_once_for_all_its_experts():
    loads = []
    w = draw(3, 4, 8)
    whole = floats(ALL, w)
    entry = whole.as_(load=lambda: loads.append(1) or whole.load())
    for i, part in enumerate(experts.unstacked([entry]).values()):
        assert part.name == GATE.format(i) and torch.equal(part.load().dequantize(), w[i])
    assert loads == [1]


def test_a_stack_that_does_not_come_apart_is_refused_by_name():
    entry = Entry(ALL, (3, 4, 64), codecs.get("nf4-dq"), lambda: None)
    with pytest.raises(FewbitsError, match="experts.gate_proj.weight .* does not come apart"):
        experts.unstacked([entry])
    assert list(experts.unstacked([entry], but={ALL})) == [ALL]


def test_a_changed_codec_is_that_of_the_experts_too():
    stacked = experts.stacked({GATE.format(i): floats(GATE.format(i), draw(4, 8)) for i in range(2)})[ALL]
    apart = experts.unstacked([stacked.as_(codec=codecs.get("F16"))])
    assert {e.codec.name for e in apart.values()} == {"F16"}


# directories --------------------------------------------------------------------------------------------------------
def test_a_directory_is_written_as_it_was_read(tmp_path):
    tensors = {"model.embed_tokens.weight": draw(6, 8), LAYER + "gate.weight": draw(3, 8)}
    tensors |= {GATE.format(i): draw(3, 4, 8)[i] for i in range(3)}
    source = containers.open(directory(tmp_path / "m", {k: v.contiguous() for k, v in tensors.items()}))
    assert source.entries[ALL].shape == (3, 4, 8) and len(source.entries) == 3
    base.write(TransformersDirectory(), tmp_path / "out", source)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "m/model.safetensors").read_bytes()


def test_gptq_has_a_module_an_expert(tmp_path):
    source = containers.open(directory(tmp_path / "m", {GATE.format(i): draw(4, 32, 64)[i].contiguous()
                                                        for i in range(4)}))
    entry, codec = source.entries[ALL], codecs.get("int4-g32")
    q = solvers.solve(entry.load().dequantize(), codec, "nearest")
    goal = replace(source, entries={ALL: Entry(ALL, entry.shape, codec, lambda: q)})
    back = base.write(Gptq(), tmp_path / "out", goal)
    stored = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    assert stored.keys() == {LAYER + f"experts.{i}.gate_proj.{part}" for i in range(4)
                             for part in ("qweight", "qzeros", "scales", "g_idx")}
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["bits"] == 4
    assert back.entries[ALL].codec == codec
    assert torch.equal(back.entries[ALL].load().planes["codes"], q.planes["codes"])
    assert Gptq().refuses(goal, goal.entries[ALL]) is None
    assert "int2, int3" in Gptq().refuses(goal, goal.entries[ALL].as_(codec=codecs.get("Q4_0")))
    assert "does not come apart" in Gptq().refuses(goal, goal.entries[ALL].as_(codec=codecs.get("nf4-dq")))
