"""AWQ's choice of scales beside a search over outputs in float64, and what it does to the error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import fewbits
from fewbits import containers, solvers, transforms
from fewbits.calibration.sources import Calibration
from fewbits.calibration.walk import Statistics, Walk
from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError
from fewbits.jobs.store import Store
from fewbits.recipe import Choice, ModelFacts, get
from fewbits.transforms import awq
from fewbits.transforms.scaling import scaled
from fewbits.transforms.sites import Site, sites
from tests.arch.models import MODELS, VOCAB, directory
from tests.arch.models import tiny as random_model


def choices_of(source: Checkpoint, recipe: str, solver: str | None = None) -> list[Choice]:
    return get(recipe).resolve(ModelFacts.of(source), solver=solver)


def tokens(vocabulary: int, samples: int = 6, length: int = 64) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    return Calibration([{"input_ids": torch.randint(0, vocabulary, (1, length), generator=generator)}
                        for _ in range(samples)], "random tokens")


@pytest.fixture(scope="module")
def stories(shared) -> Path:
    return shared("models/stories260k")


@pytest.fixture
def all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales chosen on whole weights, not on samples of their rows."""
    monkeypatch.setattr(awq, "ROWS", 1 << 20)


def layer(source: Checkpoint, number: int) -> list[Site]:
    return [site for site in sites(source) if f".{number}." in site.producer]


def inputs_of(path: Path, calibration: Calibration) -> dict[str, torch.Tensor]:
    """Weight name -> everything that its layer reads, `[tokens, in]` in float64, seen by hooks on the whole model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, x, __, name=name: seen.setdefault(name + ".weight", []).append(x[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in calibration.batches:
            model(**batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def naive(site: Site, source: Checkpoint, choices: dict[str, Choice], seen: dict[str, torch.Tensor]) -> torch.Tensor:
    """The scale of least change of the consumers' outputs themselves, in float64; the same grid."""
    quantized = [(source.entries[c].load().dequantize().double(), choices[c]) for c in site.consumers
                 if choices[c].solver]
    outputs = source.entries[site.producer].shape[0]
    if not quantized:
        return torch.ones(outputs).double()
    x = seen[site.consumers[0]]
    stacked = torch.cat([w for w, _ in quantized])
    inputs, weights = torch.empty(outputs), torch.empty(outputs)
    for i in range(outputs):
        inputs[i] = x[:, site.rows == i].square().mean().sqrt()
        weights[i] = stacked[:, site.rows == i].square().mean().sqrt()

    def scale(alpha: float, beta: float) -> torch.Tensor:
        plain = inputs.double() ** alpha / weights.double() ** beta
        return plain / plain.log().mean().exp()

    def loss(alpha: float, beta: float) -> float:
        s, total = scale(alpha, beta)[site.rows], 0.0
        for w, choice in quantized:
            q = solvers.solve((w * s).float(), choice.codec, "nearest").dequantize().double() / s
            total += float((x @ (w - q).T).square().sum(1).mean())
        return total

    best = min([(a, 0.5) for a in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)], key=lambda pair: loss(*pair))
    best = min([best, *((best[0], b) for b in (0.0, 0.25, 0.75, 1.0))], key=lambda pair: loss(*pair))
    return scale(*best) if loss(*best) < 0.97 * loss(0.0, 0.0) else torch.ones(outputs).double()


@pytest.mark.parametrize("recipe", ["int3-g32", "Q4_0", "nf4-b32"])
def test_scales_are_those_of_the_least_change_of_outputs(recipe: str, stories: Path, all_rows: None) -> None:
    source, calibration = containers.open(stories), tokens(512)
    seen = inputs_of(stories, calibration)
    choices = {c.name: c for c in choices_of(source, recipe, "nearest")}
    found = awq.scales(source, layer(source, 1), choices, calibration.batches)
    assert len(found) >= 2
    for site in layer(source, 1):
        got = found.get(site.producer, torch.ones(source.entries[site.producer].shape[0]))
        torch.testing.assert_close(got.double(), naive(site, source, choices, seen), rtol=1e-3, atol=0)


@pytest.mark.parametrize("solver", ["search", "gptq"])
@pytest.mark.parametrize("recipe", ["int3-g32", "Q4_0"])
def test_less_error_of_outputs(recipe: str, solver: str, stories: Path, all_rows: None) -> None:
    """Every site alone, on its calibration text: never worse."""
    source, calibration = containers.open(stories), tokens(512)
    choices = {c.name: c for c in choices_of(source, recipe, solver)}
    moments = {n: s for block in Walk(source, calibration.batches) for n, s in block.statistics().items()}

    def loss(checkpoint: Checkpoint, name: str, scale: torch.Tensor) -> float:
        w, original = checkpoint.entries[name].load().dequantize(), source.entries[name].load().dequantize()
        seen = Statistics(moments[name].moment / scale / scale[:, None], moments[name].count)
        error = solvers.solve(w, choices[name].codec, solver, seen).dequantize() / scale - original
        return float(((error @ moments[name].moment) * error).sum())

    before = after = 0.0
    found = awq.scales(source, layer(source, 2), choices, calibration.batches)
    for site, scale in ((s, found[s.producer]) for s in layer(source, 2) if s.producer in found):
        changed = scaled(source, [(site, scale)], {})
        names = [c for c in site.consumers if choices[c].solver]
        old = sum(loss(source, c, torch.ones(len(site.rows))) for c in names)
        new = sum(loss(changed, c, scale[site.rows]) for c in names)
        assert new < old, site.producer
        before, after = before + old, after + new
    assert 0 < after < (0.9 if solver == "search" else 0.97) * before


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_and_their_router(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awq, "LEAST_GAIN", -9.0)  # the best scale of every site, however bad
    source = containers.open(directory(random_model(MODELS[name]), tmp_path / "m"))
    calibration = tokens(VOCAB, 2, 32)
    choices = choices_of(source, "Q4_0", "search")
    found = awq.scales(source, layer(source, 1), {c.name: c for c in choices}, calibration.batches)
    assert list(found) == [site.producer for site in layer(source, 1)]
    after = scaled(source, [(site, found[site.producer]) for site in layer(source, 1)], {})
    with torch.no_grad():
        wanted, got = (fewbits.load(c)(calibration.batches[0]["input_ids"]).logits for c in (source, after))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_nothing_is_loaded_and_nothing_changes_where_nothing_is_quantized(stories: Path) -> None:
    source = containers.open(stories)
    after = transforms.apply("awq", source, choices_of(source, "f32"), tokens(512))
    assert all(entry is source.entries[name] for name, entry in after.entries.items())


def test_an_unknown_transform(stories: Path) -> None:
    with pytest.raises(FewbitsError, match="unknown transform 'smooth'"):
        transforms.apply("smooth", containers.open(stories), [], tokens(512))


def test_scales_are_kept_for_a_run_that_resumes(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, calibration = containers.open(stories), tokens(512, 2, 32)
    choices = [c for c in choices_of(source, "Q4_0", "nearest") if ".0." in c.name]
    store = Store(tmp_path / "work", {})
    first = transforms.apply("awq", source, choices, calibration, store=store)
    monkeypatch.setitem(transforms.TRANSFORMS, "awq", lambda *_: pytest.fail("looked for again"))
    again = transforms.apply("awq", source, choices, calibration, store=store)
    changed = [n for n, e in first.entries.items() if e is not source.entries[n]]
    assert changed
    for name, entry in first.entries.items():
        assert torch.equal(entry.load().dequantize(), again.entries[name].load().dequantize())


@pytest.mark.parametrize(("recipe", "name"), [("int4-g32", "m"), ("Q4_0", "m.gguf")])
def test_the_whole_way(recipe: str, name: str, stories: Path, english: Path, tmp_path: Path) -> None:
    """The file holds the transformed model's norms and its weights rounded; it is no other model."""
    source, kl = containers.open(stories), {}
    for transform in (None, "awq"):
        out = tmp_path / str(transform) / name
        out.parent.mkdir()
        fewbits.quantize(stories, out, recipe, solver="nearest", calibration=english, samples=4, length=64,
                         transform=transform)
        kl[transform] = fewbits.evaluate(out, stories, text=english, chunks=4, context=64).kl_mean
        norm = "model.layers.2.input_layernorm.weight"
        values = [c.entries[norm].load().dequantize() for c in (source, containers.open(out))]
        assert torch.allclose(*values, rtol=1e-3) == (transform is None)
    assert kl["awq"] < 1.2 * kl[None], kl  # it helps little on so small a model


def test_needs_text(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="transform awq needs calibration text"):
        fewbits.quantize(stories, tmp_path / "m.gguf", "Q4_0", transform="awq")
