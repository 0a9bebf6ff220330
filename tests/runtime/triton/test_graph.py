"""CUDA graphs of single tokens: what they are given, and that nothing in them waits for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits import containers, devices
from fewbits.runtime import decoder
from fewbits.runtime.sequences import Decoder
from fewbits.runtime.triton import attention, plan, rows
from fewbits.runtime.triton.engine import Gpu
from tests.arch.models import directory, tiny
from tests.runtime.test_decoder import MODELS, TOKENS, nmse


class Pretended:
    """Runs the function at every replay; on a GPU nothing but the contents of its input may differ by then."""

    made: list[Pretended] = []

    def __init__(self, run: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], inputs: torch.Tensor):
        self.run, self.inputs, self.seen = run, inputs, list[torch.Tensor]()
        self.made.append(self)
        run(inputs)

    def replay(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert inputs.shape == self.inputs.shape
        self.inputs.copy_(inputs)
        self.seen.append(inputs.clone())
        return self.run(self.inputs)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return directory(tiny(MODELS["qwen3_moe-odd"]), tmp_path / "m")


def compiled(path: Path, device: str) -> Decoder:
    return decoder.compile_for(containers.open(path), Gpu(torch.device(device), torch.float32))


def test_replays(path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences in a graph of four, the fourth token nobody's; others of them later in the same graph."""
    model = compiled(path, device)
    model.plan.captures = False
    want = model.logits(TOKENS[:7])
    monkeypatch.setattr(plan, "Graph", Pretended)
    monkeypatch.setattr(plan, "BATCHES", (1, 2, 4))
    monkeypatch.setattr(Pretended, "made", [])
    model.plan.captures = True
    texts = [model.sequence(size) for size in (8, 100, 70)]
    model.step([(text, TOKENS[:n], 0) for text, n in zip(texts, (5, 3, 4), strict=True)])
    assert not Pretended.made, "prompts are launched"
    found = model.step([(text, TOKENS[n:n + 1], 1) for text, n in zip(texts, (5, 3, 4), strict=True)])
    for logits, n in zip(found, (5, 3, 4), strict=True):
        assert nmse(logits, want[n:n + 1]) <= 1e-11
    (graph,) = Pretended.made
    (given,) = graph.seen
    assert given[rows.TOKEN].tolist() == [*(TOKENS[n] for n in (5, 3, 4)), 0]
    assert given[rows.POSITION].tolist() == [5, 3, 4, 0]
    assert given[rows.CAPACITY].tolist() == [64, 128, 128, 64] and given[rows.OFFSET, 3] == 0
    assert given[[rows.FIRST, rows.LENGTH]].tolist() == [[0, 1, 2, 3], [1] * 4] and len(model.plan._spare.data) == 2
    texts[1].truncate(2)
    mixed = model.step([(texts[1], TOKENS[2:3], 0), (texts[2], [7], 0), (texts[0].copy(4), TOKENS[4:5], 1)])
    assert [len(logits) for logits in mixed] == [0, 0, 1] and nmse(mixed[2], want[4:5]) <= 1e-11
    guessed = model.step([(texts[0], TOKENS[6:7], 1), (texts[1], TOKENS[3:6], 2)])
    assert nmse(guessed[0], want[6:7]) <= 1e-11 and nmse(guessed[1], want[4:6]) <= 1e-11
    assert len(Pretended.made) == 1, "the same graph, whatever the pieces"
    assert graph.seen[2][rows.POSITION].tolist() == [6, 3, 4, 5]
    assert graph.seen[2][[rows.FIRST, rows.LENGTH]].tolist() == [[0, 1, 3, 0], [1, 2, 1, 0]]
    one = model.step([(texts[1], TOKENS[6:7], 1)], states=True)[0]
    assert nmse(model.head(one), want[6:7]) <= 1e-11 and len(Pretended.made) == 2


class Launched:
    """In place of a kernel: checks where its tensors are."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: Any, **options: Any) -> None:
        self.count += 1
        assert {a.device.type for a in arguments if isinstance(a, torch.Tensor)} == {"meta"}


@pytest.mark.parametrize("name", ["qwen3_moe-odd", "gpt2-by-layer", "phi3-longrope", "gemma2"])
def test_nothing_waits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that has shapes only: to ask for a value, or for as many as there are of something, is an error, and
    so is a tensor that lies elsewhere."""
    checkpoint = containers.open(directory(tiny(MODELS[name]), tmp_path / "m"))
    kernels = {(module, kernel): Launched() for module, kernel in (
        (rows, "_norm"), (rows, "_gate"), (rows, "_keep"), (attention, "_attend"), (attention, "_join"))}
    for (module, kernel), launched in kernels.items():
        monkeypatch.setattr(module, kernel, launched)
    monkeypatch.setattr(plan, "_processors", lambda device: 132)
    monkeypatch.setattr(devices, "free_bytes", lambda device: 1 << 40)
    meta = torch.device("meta")
    made = decoder.compile_for(checkpoint, Gpu(meta, torch.bfloat16)).plan
    with torch.inference_mode():
        numbers = torch.zeros(rows.ROWS, 4, dtype=torch.int64, device=meta)
        states, logits = made._after(numbers)
    assert (states.dtype, states.device, logits.device, len(logits)) == (torch.float32, meta, meta, 4)
    assert all(launched.count for launched in kernels.values())
