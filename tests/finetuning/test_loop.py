"""The loop: it learns, resumes to the same bytes, stops before parameters are spoilt, and says what stops it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewbits.errors import FewbitsError
from fewbits.finetuning import checkpoints
from fewbits.finetuning.data import IGNORED, Data, Example
from fewbits.finetuning.loop import Outcome, Settings, run, write_losses
from fewbits.finetuning.loss import Inputs

TARGET = torch.arange(8.0)


class Table(nn.Module):
    """A row for each token, and a frozen one beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Embedding(8, 8)
        self.fixed = nn.Parameter(torch.randn(8), requires_grad=False)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.rows(inputs["input_ids"]) + self.fixed


def loss(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Mean over the learnt tokens of a distance."""
    learnt = inputs["labels"][:, 1:] != IGNORED
    distance = (model(**inputs)[:, 1:] - TARGET).square().mean(-1)
    return (distance * learnt).sum() / learnt.sum()


def data(count: int = 24, length: int = 6) -> Data:
    torch.manual_seed(3)
    rows = [torch.randint(0, 8, (length - i % 3,)) for i in range(count)]
    return Data(tuple(Example(ids, ids) for ids in rows), "made up")


SETTINGS = Settings(steps=12, batch=2, rate=0.3, weight_decay=0.01, save_every=0.0)


def trained(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_learns_and_tells(tmp_path: Path) -> None:
    model, told = Table(), []
    fixed = model.fixed.clone()
    outcome = run(model, data(), Settings(steps=40, batch=4, rate=1.0, held_out=0.25), tmp_path, loss=loss,
                  progress=lambda *a: told.append(a))
    assert outcome.steps == 40 and outcome.trained == 64 and outcome.diverged is None
    assert [step for step, _ in outcome.losses] == list(range(1, 41))
    assert [step for step, _ in outcome.held_out] == [0, 10, 20, 30, 40]
    assert outcome.held_out[-1][1] < 0.2 * outcome.held_out[0][1]
    assert torch.equal(model.fixed, fixed)
    assert told[-1][1:] == (40, 40) and told[-1][0].startswith("fine-tuning: loss ") and "held-out" in told[-1][0]


def test_epochs_are_counted_in_steps() -> None:
    assert Settings(epochs=2, batch=4, accumulation=2).total(21) == 6
    assert Settings(epochs=0.1, batch=4).total(3) == 1 and Settings(steps=7).total(10 ** 6) == 7


def test_accumulated_batches_count_tokens_not_batches(tmp_path: Path) -> None:
    """One step on four examples of different lengths at once, or one by one."""
    found = []
    for batch, accumulation in ((4, 1), (1, 4)):
        model = Table()
        settings = Settings(steps=1, batch=batch, accumulation=accumulation, held_out=0, optimizer="sgd",
                            schedule="constant", warm_up=0, rate=1.0, clip=0.0)
        run(model, data(4), settings, tmp_path / str(batch), loss=loss)
        found.append(trained(model))
    torch.testing.assert_close(*found)


class Killed(Exception):
    pass


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_killed_run_goes_on_to_the_same_parameters(accumulation: int, tmp_path: Path) -> None:
    settings = Settings(steps=12, batch=2, accumulation=accumulation, rate=0.3, save_every=0.0)
    whole = Table()
    unbroken = run(whole, data(), settings, tmp_path / "a", loss=loss)

    def kill(what: str, done: int, total: int) -> None:
        if done == 7:
            raise Killed

    with pytest.raises(Killed):
        run(Table(), data(), settings, tmp_path / "b", loss=loss, progress=kill)
    last = max((tmp_path / "b").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    assert {p.name for p in last.iterdir()} >= {"trained.safetensors", "optimizer.pt"}
    begun: list[int] = []
    model = Table()
    resumed = run(model, data(), settings, tmp_path / "b", loss=loss, progress=lambda w, done, t: begun.append(done))
    assert min(begun) in (7, 8) and torch.equal(trained(model), trained(whole))
    assert resumed.losses == unbroken.losses and resumed.held_out == unbroken.held_out


def test_a_half_written_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    whole = Table()
    run(whole, data(), SETTINGS, tmp_path / "a", loss=loss)
    (tmp_path / "b" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "b" / "checkpoint-9" / "trained.safetensors").write_bytes(b"half")
    model = Table()
    run(model, data(), SETTINGS, tmp_path / "b", loss=loss)
    assert torch.equal(trained(model), trained(whole))


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_nan_stops_at_the_last_good_checkpoint(bad: str, tmp_path: Path) -> None:
    """At step 8: of the loss itself, or of its gradient alone."""
    seen: list[torch.Tensor] = []

    def spoilt(model: nn.Module, inputs: Inputs) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.append(trained(model))
        value = loss(model, inputs)
        if torch.is_grad_enabled() and len(seen) == 8:
            return value * float("nan") if bad == "loss" else value + (value - value.detach()).sqrt()
        return value

    model = Table()
    outcome = run(model, data(), SETTINGS, tmp_path, loss=spoilt)
    assert outcome.diverged == 8 and outcome.steps == 7
    assert torch.equal(trained(model), seen[7]), "what the eighth step began with"


def test_nan_before_anything_is_kept(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="not finite at step 1, before anything was learnt"):
        run(Table(), data(), SETTINGS, tmp_path, loss=lambda m, i: loss(m, i) * float("nan"))


@pytest.mark.parametrize("error", [RuntimeError("PytorchStreamWriter failed writing file"),
                                   OSError(errno.ENOSPC, "No space left on device")])
def test_a_full_disk_is_an_os_error(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*given: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "save", write)
    monkeypatch.setattr(checkpoints, "LITTLE", 1 << 62)  # the disk counts as full
    with pytest.raises(OSError) as found:
        run(Table(), data(), SETTINGS, tmp_path, loss=loss)
    assert found.value.errno == errno.ENOSPC


def test_other_errors_of_saving_are_not_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*given: Any, **named: Any) -> None:
        raise RuntimeError("cannot pickle")

    monkeypatch.setattr(torch, "save", write)
    with pytest.raises(RuntimeError, match="cannot pickle"):
        run(Table(), data(), SETTINGS, tmp_path, loss=loss)


@pytest.mark.parametrize(("named", "message"), [
    ({"optimizer": "adamw_bnb_8bit"}, "--optimizer adamw_bnb_8bit: .*bitsandbytes"),
    ({"optimizer": "best"}, "--optimizer best, --schedule cosine: best is not a valid OptimizerNames"),
    ({"schedule": "up"}, "up is not a valid SchedulerType")])
def test_names_that_are_not_there(named: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match=message) as error:
        run(Table(), data(), Settings(steps=1, **named), tmp_path, loss=loss)  # type: ignore[arg-type]
    assert "\n" not in str(error.value) and error.value.hint
    with pytest.raises(FewbitsError, match="no examples"):
        run(Table(), [], SETTINGS, tmp_path, loss=loss)


def test_losses_are_left(tmp_path: Path) -> None:
    outcome = Outcome(2, [(1, 2.0), (2, 1.5)], [(0, 2.1), (2, 1.6)], 10, 1.0)
    write_losses(outcome, tmp_path)
    assert '"losses"' in (tmp_path / "loss.json").read_text()
    pytest.importorskip("matplotlib")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
