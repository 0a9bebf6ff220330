"""Statistics of experts after routing, against loops over tokens in float64; GPTQ on stacks of them."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits import codecs, containers, solvers
from fewbits.calibration.walk import Batches, Experts, Statistics, Walk
from fewbits.checkpoint import Checkpoint
from fewbits.containers import experts
from fewbits.qtensor import QTensor
from fewbits.runtime.taps import is_experts

sys.path.insert(0, str(Path(__file__).parents[1] / "arch"))
from models import MODELS, directory, tiny  # type: ignore[import-not-found]  # noqa: E402

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")


def batches(count: int = 3, length: int = 40) -> Batches:
    torch.manual_seed(5)
    return [{"input_ids": torch.randint(0, 320, (1, length))} for _ in range(count)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Checkpoint]:
    model = tiny(MODELS[request.param])
    return model, containers.open(directory(model, tmp_path_factory.mktemp(request.param) / "m"))


def matrices(module: Any, name: str) -> torch.Tensor:
    """`[experts, out, in]`."""
    weight = getattr(module, name).double()
    return weight.mT if type(module).__name__ == "GptOssExperts" else weight


def naive(model: Any, given: Batches) -> dict[str, list[list[torch.Tensor]]]:
    """What `gate_up_proj` and `down_proj` of every expert read: `found["layers.0 down"][expert]` lists vectors."""
    found: dict[str, list[list[torch.Tensor]]] = {}

    def hook(layer: str) -> Any:
        def see(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            hidden, index, _ = args
            up, bias = matrices(module, "gate_up_proj"), getattr(module, "gate_up_proj_bias", None)
            for name in ("up", "down"):
                found.setdefault(f"{layer} {name}", [[] for _ in up])
            for token, chosen in zip(hidden.double(), index.tolist(), strict=True):
                for e in chosen:
                    y = up[e] @ token + (0 if bias is None else bias[e].double())
                    found[f"{layer} up"][e].append(token)
                    found[f"{layer} down"][e].append(module._apply_gate(y[None])[0])
        return see

    handles = [m.register_forward_pre_hook(hook(f"layers.{n.split('.')[2]}"))
               for n, m in model.named_modules() if is_experts(m)]
    with torch.no_grad():
        for batch in given:
            model(**batch)
    for handle in handles:
        handle.remove()
    return found


def moment(rows: list[torch.Tensor]) -> torch.Tensor:
    x = torch.stack(rows)
    return x.T @ x / len(x)


def part(name: str) -> str:
    """`up` or `down`, by the name of an entry."""
    return "down" if "down_proj" in name or ".w2." in name else "up"


def test_every_expert_gets_the_moment_of_what_it_read(family: tuple[Any, Checkpoint]) -> None:
    model, source = family
    want, seen = naive(model, batches()), 0
    for block in Walk(source, batches(), sequential=False):
        for name, found in block.statistics().items():
            if ".experts." not in name:
                assert isinstance(found, Statistics)
                continue
            assert isinstance(found, Experts)
            rows = want[f"layers.{block.index} {part(name)}"]
            assert found.counts == [len(r) for r in rows]
            for p, r in zip(found.parts, rows, strict=True):
                if r:
                    torch.testing.assert_close(p.moment.double(), moment(r), rtol=1e-4, atol=1e-5)
            seen += 1
    assert seen == 2 * (2 if "GptOss" in type(model).__name__ else 3)


def test_outputs_are_those_of_the_model(family: tuple[Any, Checkpoint]) -> None:
    """Tapped, experts run in a loop of ours: the same numbers, quantized experts too, on to the next block."""
    model, source = family
    changed = copy.deepcopy(model)
    parameters = {n: m for n, m in changed.named_modules() if is_experts(m)}
    for block in Walk(source, batches(2)):
        want = naive(changed, batches(2))
        for group in block.groups():
            statistics = {n: f for n, f in group.statistics().items() if ".experts." in n}
            for name, found in statistics.items():
                assert isinstance(found, Experts)
                if part(name) == "up":
                    rows = want[f"layers.{block.index} up"]
                    for p, r in zip(found.parts, rows, strict=True):
                        if r:
                            torch.testing.assert_close(p.moment.double(), moment(r), rtol=1e-3, atol=1e-4)
            for name, found in statistics.items():
                q = solvers.solve(source.entries[name].load().dequantize(), codecs.get("int4-g16"), "gptq", found)
                block.replace(name, q)
                fill(parameters, name, q.dequantize())


def fill(modules: dict[str, Any], name: str, value: torch.Tensor) -> None:
    """Put a stack into the fused parameters of the model."""
    module = next(m for n, m in modules.items() if f".{name.split('.')[2]}." in n)
    leaf = next(k for k in ("w1", "w3", "w2", "gate_up_proj", "gate_proj", "up_proj", "down_proj") if f".{k}" in name)
    if leaf in ("w2", "down_proj"):
        matrices_(module, "down_proj").copy_(value)
    elif leaf == "gate_up_proj":
        matrices_(module, leaf).copy_(value)
    else:
        at = 0 if leaf in ("w1", "gate_proj") else 1
        matrices_(module, "gate_up_proj").chunk(2, dim=1)[at].copy_(value)


def matrices_(module: Any, name: str) -> torch.Tensor:
    weight = getattr(module, name).data
    return weight.mT if type(module).__name__ == "GptOssExperts" else weight


def test_experts_by_themselves_get_theirs(family: tuple[Any, Checkpoint]) -> None:
    model, source = family
    apart = replace(source, entries=experts.unstacked(source.entries.values()))
    stacks = next(iter(Walk(source, batches()))).statistics()
    block = next(iter(Walk(apart, batches(), sequential=False)))
    found = block.statistics()
    names = [n for n in found if experts.ONE.fullmatch(n)]
    if not names:
        pytest.skip("files of gpt-oss hold no experts by themselves")
    for name in names:
        match = experts.ONE.fullmatch(name)
        whole = stacks[experts.stack_of(name)]
        assert match and isinstance(whole, Experts) and isinstance(found[name], Statistics)
        assert torch.equal(found[name].moment, whole.expert(int(match[2])).moment)  # type: ignore[union-attr]
    gate, up = [n for n in names if ".experts.3." in n and part(n) == "up"]
    assert found[gate] is found[up], "they read the same"


# few tokens ---------------------------------------------------------------------------------------------------------
def test_few_tokens_lean_on_all_experts() -> None:
    torch.manual_seed(0)
    x = torch.randn(100, 8) @ torch.randn(8, 8)
    found = Experts(3, 8)
    found.add(x[:60], None, (57, 3, 0))
    found.add(x[60:], None, (40, 0, 0))
    assert found.counts == [97, 3, 0] and found.few == 2
    pooled = x.double().T @ x.double() / 100
    own = x[57:60].double().T @ x[57:60].double() / 3
    torch.testing.assert_close(found.expert(1).moment.double(), (3 * own + 8 * pooled) / 11, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.expert(2).moment.double(), pooled, rtol=1e-5, atol=1e-6)
    assert found.expert(1) is found.expert(1), "blended once, and the same object for all that share it"


def test_notes_say_how_many_saw_few(family: tuple[Any, Checkpoint]) -> None:
    _, source = family
    walk = Walk(source, batches(1, 12))
    want = 0
    for block in walk:
        for group in block.groups():
            found = group.statistics()
            want += next((e.few for n, e in found.items() if ".experts." in n and part(n) == "up"), 0)  # type: ignore
    assert want and walk.notes[0].startswith(f"{want} of ")


def test_a_stack_is_solved_as_each_expert_is() -> None:
    torch.manual_seed(0)
    w, found = torch.randn(3, 24, 64), Experts(3, 64)
    found.add(torch.randn(500, 64) @ torch.randn(64, 64) / 8, None, (300, 190, 10))
    for name, solver in (("int4-g32", "gptq"), ("Q4_0", "gptq"), ("int3-g32", "search"), ("nf4", "search")):
        codec = codecs.get(name)
        whole = solvers.solve(w, codec, solver, found)
        assert isinstance(whole, QTensor) and whole.shape == w.shape
        for i, values in enumerate(whole.dequantize()):
            one = solvers.solve(w[i], codec, solver, found.expert(i)).dequantize()
            if solver == "gptq":
                assert torch.equal(values, one), name
            errors = [((x - w[i]).square() * found.expert(i).diagonal).sum(-1) for x in (values, one)]
            torch.testing.assert_close(*errors, rtol=1e-5, atol=0)  # a search may meet two scales of equal error


# the original beside --------------------------------------------------------------------------------------------------
def pairs(model: Any, given: Batches) -> dict[str, dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]]]:
    """(batch, token, expert) -> what it reads for `gate_up_proj` and `down_proj`, of every layer of experts."""
    found: dict[str, dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]]] = {}
    number = 0

    def hook(layer: str) -> Any:
        def see(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            hidden, index, _ = args
            up, bias = matrices(module, "gate_up_proj"), getattr(module, "gate_up_proj_bias", None)
            for token, (x, chosen) in enumerate(zip(hidden.double(), index.tolist(), strict=True)):
                for e in range(len(up)):
                    y = module._apply_gate((up[e] @ x + (0 if bias is None else bias[e].double()))[None])[0]
                    seen = y if e in chosen else torch.full_like(y, torch.nan)
                    found.setdefault(layer, {})[number, token, e] = x, seen
        return see

    handles = [m.register_forward_pre_hook(hook(n.split(".")[2])) for n, m in model.named_modules() if is_experts(m)]
    with torch.no_grad():
        for number, batch in enumerate(given):  # noqa: B007
            model(**batch)
    for handle in handles:
        handle.remove()
    return found


def test_drift_of_experts(family: tuple[Any, Checkpoint]) -> None:
    """Where the original model sent a token to another expert, its `down_proj` counts as not drifted."""
    model, source = family
    changed, given, elsewhere = copy.deepcopy(model), batches(1, 40), 0
    modules = {n: m for n, m in changed.named_modules() if is_experts(m)}
    originals = pairs(model, given)
    for block in Walk(source, given, drift=True):
        groups = [(g, g.statistics()) for g in block.groups()]  # of the block as it came
        own, layer = pairs(changed, given)[str(block.index)], originals[str(block.index)]
        for _, statistics in groups:
            for name, found in statistics.items():
                if ".experts." not in name:
                    continue
                assert isinstance(found, Experts)
                at = 1 if part(name) == "down" else 0
                for e, p in enumerate(found.parts):
                    read = [(own[k][at], layer[k][at]) for k in own if k[2] == e and not own[k][1].isnan().any()]
                    assert p.count == len(read) and p.drift is not None
                    gone = [bool(x0.isnan().any()) for _, x0 in read]
                    elsewhere += sum(gone)
                    want = sum((torch.outer(x0 - x, x) for (x, x0), g in zip(read, gone, strict=True) if not g),
                               torch.zeros(p.drift.shape, dtype=torch.float64)) / max(1, len(read))
                    torch.testing.assert_close(p.drift.double(), want, rtol=1e-3, atol=1e-4)
        for name in (n for _, statistics in groups for n in statistics):
            q = solvers.solve(source.entries[name].load().dequantize(), codecs.get("int2-g16"), "nearest")
            block.replace(name, q)
            if ".experts." in name:
                fill(modules, name, q.dequantize())
            else:
                changed.get_submodule(name.removesuffix(".weight")).weight.data.copy_(q.dequantize())
    assert elsewhere, "some tokens went to other experts"
