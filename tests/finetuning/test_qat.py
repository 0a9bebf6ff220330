"""Training as quantized: nearer to the original than GPTQ, exported as trained, resumable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fewbits
from fewbits import containers
from fewbits.errors import FewbitsError
from fewbits.finetuning import qat as qat_module
from fewbits.finetuning.data import Example
from fewbits.finetuning.fake import Fake
from fewbits.finetuning.qat import SETTINGS, Trained, qat
from fewbits.loading import load
from fewbits.qtensor import QTensor

FEW = replace(SETTINGS, steps=6, length=48, batch=2, rate=0.01, held_out=0.0)


def quantized(tiny: Path, out: Path, english: Path, recipe: str, **more: Any) -> Path:
    return fewbits.quantize(tiny, out, recipe, calibration=english, samples=8, length=48, **more).path


@pytest.fixture(scope="module")
def start(tiny: Path, english: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tiny, tmp_path_factory.mktemp("start") / "int2", english, "int2-g32")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that were trained."""
    models: list[Any] = []

    def run(net: Any, *given: Any, **named: Any) -> Any:
        outcome = real(net, *given, **named)
        models.append(net.eval())
        return outcome

    real = qat_module.run
    monkeypatch.setattr(qat_module, "run", run)
    return models


def weights(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("recipe", "name", "scales"), [
    ("int2-g32", "a", "learned"), ("int3-g32-asym", "a", "refitted"), ("nf4-b32", "a", "learned"),
    ("nf4-dq", "a", "refitted"), ("Q4_0", "a.gguf", "learned"), ("Q2_K", "a.gguf", "refitted"),
    ("kmeans3", "a", "fixed")])
def test_written_is_what_was_multiplied_by(recipe: str, name: str, scales: str, tiny: Path, english: Path,
                                           tmp_path: Path, seen: list[Any]) -> None:
    found = qat(tiny, tmp_path / name, recipe, data=english, scales=scales, refit_every=2, settings=FEW)
    assert not list(tmp_path.glob(".*")) and (tmp_path / f"{name}.loss.json").exists()
    (net,), written = seen, containers.open(found.path)
    assert written.container == found.container
    fakes = {n: m for n, m in net.named_modules() if isinstance(m, Fake)}
    assert len(fakes) == (12 if name.endswith("gguf") else 14)  # no block of 32 divides the width of the others
    for module, fake in fakes.items():
        fake.encode()
        assert torch.equal(written.entries[f"{module}.weight"].load().dequantize(), fake.weight()), module
    ids = torch.arange(40)[None] + 5
    with torch.no_grad():
        assert torch.equal(load(found.path, kernel="decoded")(ids).logits, net(ids).logits)


def test_norms_are_trained_and_written_as_they_were(tiny: Path, start: Path, english: Path, tmp_path: Path,
                                                    seen: list[Any]) -> None:
    found = qat(tiny, tmp_path / "a", "int2-g32", data=english, start=start, settings=FEW)
    before, after = (containers.open(p).entries["model.norm.weight"].load().dequantize() for p in (start, found.path))
    assert not torch.equal(before, after) and torch.equal(after, seen[0].model.norm.weight)


def test_nearer_than_what_it_began_at(shared: Any, tmp_path: Path) -> None:
    model, text = shared("models/stories260k"), shared("text/tinystories.txt").read_text()
    learn, test = tmp_path / "learn.txt", tmp_path / "test.txt"
    learn.write_text(text[:60_000])
    test.write_text(text[200_000:230_000])
    gptq = fewbits.quantize(model, tmp_path / "gptq", "int2-g32", calibration=learn, samples=8, length=128).path
    settings = replace(SETTINGS, steps=40, length=128, batch=2, rate=0.01)
    found = qat(model, tmp_path / "qat", "int2-g32", data=learn, start=gptq, settings=settings)

    def divergence(path: Path) -> float:
        kl = fewbits.evaluate(path, model, text=test, context=128, chunks=8, kernel="decoded").kl_mean
        assert kl is not None
        return kl

    before, after = divergence(gptq), divergence(found.path)
    assert after < 0.8 * before
    held = [value for _, value in found.outcome.held_out]
    assert held[-1] < 0.8 * held[0]
    a, b = (containers.open(p) for p in (gptq, found.path))
    assert a.nbytes == b.nbytes and {n: e.codec for n, e in a.entries.items()} == {
        n: e.codec for n, e in b.entries.items()}


def test_the_first_loss_is_that_of_the_start(tiny: Path, start: Path, english: Path, tmp_path: Path) -> None:
    """In float64 from Transformers' logits, over the tokens that are learnt."""
    ids = torch.randint(5, 200, (4, 24), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :10] = -100
    data = [Example(i, y) for i, y in zip(ids, labels, strict=True)]
    settings = replace(FEW, steps=1, batch=4, held_out=0.0)
    found = {distill: qat(tiny, tmp_path / f"{distill}", "int2-g32", data=data, start=start, distill=distill,
                          settings=settings) for distill in (True, False)}
    with torch.no_grad():
        p, q = (load(m, kernel="decoded")(ids).logits.double().log_softmax(-1)[:, 9:-1] for m in (tiny, start))
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    entropy = float(-q.gather(-1, ids[:, 10:, None]).mean())
    assert found[True].outcome.losses[0][1] == pytest.approx(divergence, rel=1e-3)
    assert found[False].outcome.losses[0][1] == pytest.approx(entropy, rel=1e-3)


@pytest.mark.parametrize("scales", ["learned", "refitted"])
def test_a_killed_run_goes_on_to_the_same_bytes(scales: str, tiny: Path, start: Path, english: Path,
                                                tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if what.startswith("fine-tuning") and done >= 4:
            raise Killed

    def trained(name: str, progress: Any = None) -> Trained:
        return qat(tiny, tmp_path / name, "int2-g32", data=english, start=start, scales=scales, refit_every=2,
                   settings=replace(FEW, save_every=0.0), progress=progress)

    unbroken = trained("a").path
    with pytest.raises(Killed):
        trained("b", kill)
    steps: list[int] = []
    resumed = trained("b", lambda what, done, total: steps.append(done) if what.startswith("fine-tuning") else None)
    assert min(steps) > 2
    assert weights(resumed.path) == weights(unbroken)


@pytest.mark.parametrize(("kind", "config"), [(transformers.GPT2LMHeadModel, transformers.GPT2Config),
                                              (transformers.OpenAIGPTLMHeadModel, transformers.OpenAIGPTConfig)])
def test_weights_that_files_hold_transposed(kind: Any, config: Any, tiny: Path, tmp_path: Path,
                                            seen: list[Any]) -> None:
    """Square ones among them; of a family that the table has and of one that it has not."""
    torch.manual_seed(0)
    folder = tmp_path / "gpt"
    kind(config(n_embd=64, n_layer=2, n_head=2, n_positions=64, vocab_size=300, bos_token_id=1, eos_token_id=2,
                initializer_range=0.2)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tiny / file).read_bytes())
    data = [Example(ids, ids) for ids in torch.randint(5, 200, (8, 32), generator=torch.Generator().manual_seed(0))]
    found = qat(folder, tmp_path / "out", "int8-g64", data=data, settings=replace(FEW, rate=1e-6), container="fewbits")
    fakes = {n: m for n, m in seen[0].named_modules() if isinstance(m, Fake)}
    original = kind.from_pretrained(folder)
    assert len(fakes) == 8
    for name, fake in fakes.items():
        weight = original.get_submodule(name).weight.T
        assert float((fake.latent * fake.level - weight).norm() / weight.norm()) < 0.05, name
    ids = torch.arange(30)[None] + 5
    with torch.no_grad():
        assert torch.allclose(load(found.path, kernel="decoded")(ids).logits, seen[0](ids).logits, atol=1e-5)


def test_without_a_start_one_is_made_on_the_data(tiny: Path, english: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    real = qat_module.quantize
    monkeypatch.setattr(qat_module, "quantize", lambda *a, **k: made.append(a[1]) or real(*a, **k))
    monkeypatch.setattr(qat_module, "run", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        qat(tiny, tmp_path / "a", "int3-g32", data=english, settings=FEW)
    begun = containers.open(made[0])
    assert begun.entries["model.layers.0.mlp.up_proj.weight"].codec.name == "int3-g32"
    monkeypatch.undo()
    monkeypatch.setattr(qat_module, "quantize", None)  # it is there already
    found = qat(tiny, tmp_path / "a", "int3-g32", data=english, settings=FEW)
    assert any(n.startswith("calibrated on") for n in found.notes) or not found.notes
    assert found.path.exists()


def test_never_worse_on_held_out_text(tiny: Path, start: Path, english: Path, tmp_path: Path) -> None:
    wild = replace(FEW, rate=3.0, held_out=0.1)
    found = qat(tiny, tmp_path / "a", "int2-g32", data=english, start=start, settings=wild)
    assert any("what is written is the start" in n for n in found.notes)
    assert weights(found.path) == weights(start)


def test_bad_input(tiny: Path, start: Path, english: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, recipe: str = "int2-g32", **more: Any) -> None:
        with pytest.raises(FewbitsError, match=message):
            qat(tiny, tmp_path / "a", recipe, **{"data": english, "start": start, "settings": FEW, **more})
        assert not (tmp_path / "a").exists()

    refused("--scales free: no such way", scales="free")
    refused("is int2-g32, int3-g32 wants int3-g32", recipe="int3-g32")
    refused("is gptq, nf4 goes to bitsandbytes", recipe="nf4")
    refused("no linear layer in it is quantized", recipe="bf16", start=None)
    refused("not finite at step", settings=replace(FEW, rate=1e30))
    monkeypatch.setattr(qat_module, "available_bytes", lambda: 10 ** 6)
    refused(r"training \d+ weights takes about .* GB of memory, 0.0 GB are free")


def test_after_a_loss_that_is_not_finite_the_last_checkpoint_is_written(
        tiny: Path, start: Path, english: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the fourth step is NaN; three are kept."""
    real = qat_module.Distillation.__call__
    calls: list[int] = []

    def spoilt(self: Any, model: Any, inputs: Any) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return real(self, model, inputs) * (float("nan") if sum(calls) == 4 else 1.0)

    monkeypatch.setattr(qat_module.Distillation, "__call__", spoilt)
    with pytest.raises(FewbitsError, match="not finite at step 4: stopped; the model as it was after step 3"):
        qat(tiny, tmp_path / "a", "int2-g32", data=english, start=start, settings=replace(FEW, save_every=0.0))
    kept = containers.open(tmp_path / "a.step-3")
    name = "model.layers.1.mlp.down_proj.weight"
    before = containers.open(start).entries[name].load()
    assert isinstance(before, QTensor) and not torch.equal(kept.entries[name].load().dequantize(), before.dequantize())
    assert not (tmp_path / "a").exists()
