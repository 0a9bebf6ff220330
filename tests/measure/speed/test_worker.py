"""Engines compute what the model says, with and without the cache; memory is watched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import fewbits
from fewbits.measure.speed.worker.base import Engine, Json, Rows
from fewbits.measure.speed.worker.memory import Memory, status
from fewbits.measure.speed.worker.own import Decoder, Layers
from fewbits.measure.speed.worker.peers import Bitsandbytes, Transformers
from fewbits.measure.speed.worker.work import repetition, warm_up

PROMPTS = [[5, 9, 60, 17], [44, 3, 3, 250], [7, 8, 200, 100]]
MADE: dict[str, type[Engine]] = {"decoder": Decoder, "modules": Layers, "transformers": Transformers}


def job(model: Path, **other: object) -> Json:
    return {"model": str(model), "kernel": None, "threads": torch.get_num_threads(), "prompts": PROMPTS, "generate": 6,
            "cache": True, "train": False, "way": None} | other


@pytest.fixture(scope="module")
def meant(tiny: Path) -> Rows:
    """What Transformers generates, greedily, a prompt at a time."""
    net = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    found = []
    for prompt in PROMPTS:
        out = net.generate(torch.tensor([prompt]), max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)
        found.append(out[0, 4:].tolist())
    return found


@pytest.mark.parametrize("name", MADE)
def test_engines_take_the_most_likely_tokens(name: str, tiny: Path, meant: Rows) -> None:
    engine = MADE[name](job(tiny))
    engine.load(job(tiny))
    tokens = [engine.begin(PROMPTS, 10)]
    for _ in range(6):
        tokens.append(engine.step(tokens[-1]))
    assert np.array(tokens).T.tolist() == meant
    rows = [[*prompt, *after[:3]] for prompt, after in zip(PROMPTS, meant, strict=True)]
    assert engine.whole(rows) == [after[3] for after in meant]


def test_the_decoder_on_a_gpu(tiny: Path, meant: Rows, gpu: None) -> None:
    engine = Decoder(job(tiny, device="cuda"))
    engine.load(job(tiny))
    assert engine.device and "decoder" not in engine.device
    tokens = [engine.begin(PROMPTS, 10)]
    tokens.append(engine.step(tokens[-1]))
    assert np.array(tokens).T.tolist() == [row[:2] for row in meant]


def test_a_repetition_takes_every_step(tiny: Path, meant: Rows) -> None:
    class Recorded(Decoder):
        calls: list[tuple[str, int, int]] = []

        def _next(self, rows: Rows) -> list[int]:
            self.calls.append(("call", len(rows), len(rows[0])))
            return super()._next(rows)

    engine = Recorded(job(tiny))
    engine.load(job(tiny))
    found = repetition(engine, job(tiny))
    assert len(found["steps"]) == 6 and min(found["first"], *found["steps"]) > 0
    assert [n for _, _, n in engine.calls] == [4, 1, 1, 1, 1, 1, 1]
    engine.calls.clear()
    repetition(engine, job(tiny, cache=False))
    assert [n for _, _, n in engine.calls] == [4, 5, 6, 7, 8, 9, 10]


def test_the_fastest_way_is_taken_and_a_refused_one_is_not(tiny: Path) -> None:
    class Ways(Engine):
        ways = ("slow", "refused", "fast", "slower")
        seconds = {"slow": 0.05, "fast": 0.0, "slower": 0.1}

        def take(self, way: str) -> None:
            self.kernel = way

        def begin(self, rows: Rows, room: int) -> list[int]:
            if self.kernel == "refused":
                raise ValueError("no")
            threading_wait(self.seconds[self.kernel])
            return [1] * len(rows)

        def step(self, tokens: list[int]) -> list[int]:
            return tokens

    engine = Ways(job(tiny))
    said = warm_up(engine, job(tiny), Memory())
    assert said["way"] == said["kernel"] == engine.kernel == "fast"
    engine.ways = ("refused",)
    with pytest.raises(ValueError, match="no"):
        warm_up(engine, job(tiny), Memory())
    with pytest.raises(ValueError, match="computes no gradients"):
        warm_up(Decoder(job(tiny)), job(tiny, train=True), Memory())


def threading_wait(seconds: float) -> None:
    import time

    time.sleep(seconds)


def test_training_goes_back_through_quantized_layers(tiny: Path, tmp_path: Path) -> None:
    out = fewbits.quantize(tiny, tmp_path / "q", "int4-g32", calibration="none").path
    engine = Layers(job(out))
    engine.load(job(out))
    found = engine.train(PROMPTS)
    assert found["forward"] > 0 and found["backward"] > 0
    assert all(p.grad is None for p in engine.net.parameters()), "weights are frozen"


def test_files_of_others_are_refused(tiny: Path, tmp_path: Path) -> None:
    out = fewbits.quantize(tiny, tmp_path / "q", "int4-g32", calibration="none").path
    with pytest.raises(ValueError, match="the weights are in a layout of gptq"):
        Transformers(job(out)).load(job(out))
    engine = Bitsandbytes.__new__(Bitsandbytes)  # without its imports
    with pytest.raises(ValueError, match="the weights are not quantized"):
        engine.read(job(tiny))


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_transformers_computes_in_the_type_that_is_stored(kind: str, tiny: Path, tmp_path: Path) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=getattr(torch, kind)).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace(f'"{kind}"', '"float16"'))
    engine = Transformers(job(tmp_path))
    engine.load(job(tmp_path))
    assert engine.kernel == kind and engine.net.dtype == getattr(torch, kind)


def test_memory_that_was_there_for_a_moment() -> None:
    if "RssAnon" not in status():
        pytest.skip("the system does not say what memory a process takes")
    memory = Memory()
    before = status()["RssAnon"]
    with memory.watched():
        held = np.ones(8 << 20)
        threading_wait(0.05)
        del held
    assert memory.most()["anonymous"] > before + (60 << 20)
    assert memory.most()["resident"] >= status()["VmRSS"]
