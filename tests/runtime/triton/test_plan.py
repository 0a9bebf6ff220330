"""The decoder of a GPU, in Triton's interpreter: against Transformers, and against itself in parts, beside others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import fewbits
from fewbits import codecs, containers
from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError, NotHere
from fewbits.runtime import decoder
from fewbits.runtime.sequences import Decoder
from fewbits.runtime.triton import engine, plan, steps
from fewbits.runtime.triton.engine import Gpu
from fewbits.solvers import solve
from tests.arch.models import SMALL, directory, tiny
from tests.runtime.test_decoder import MODELS, TOKENS, nmse, reference

SOME = ("llama-odd", "qwen2-window", "gemma2-odd", "gpt2-by-layer", "gpt_neox", "olmo2-odd", "qwen3_moe-odd")
OTHERS = [] if torch.cuda.is_available() else [pytest.mark.slow]  # the interpreter takes its time


def compiled(source: Path | Checkpoint, device: str, dtype: torch.dtype = torch.float32, **how: str) -> Decoder:
    checkpoint = source if isinstance(source, Checkpoint) else containers.open(source)
    return decoder.compile_for(checkpoint, Gpu(torch.device(device), dtype, **how))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory(tiny(MODELS["llama-odd"]), tmp_path_factory.mktemp("llama") / "m")


@pytest.fixture(scope="module")
def model(path: Path, device: str) -> Decoder:
    return compiled(path, device)


@pytest.mark.parametrize("name", [*SOME, *(pytest.param(n, marks=OTHERS) for n in MODELS if n not in SOME)])
def test_logits_are_those_of_transformers(name: str, tmp_path: Path, device: str) -> None:
    model = tiny(MODELS[name])
    made = compiled(directory(model, tmp_path / "m"), device)
    sequence = made.sequence(len(TOKENS))
    parts = (TOKENS[:18], TOKENS[18:21], TOKENS[21:22])  # windows are of 20 and 7
    logits = [sequence.append(part, last_only=False) for part in parts]
    assert nmse(np.concatenate(logits), reference(model)[:22]) <= 1e-11  # measured: up to 5e-13


@pytest.mark.parametrize("name", ["llama-odd", "gpt2"])
def test_half_precision(name: str, tmp_path: Path, device: str) -> None:
    model = tiny(MODELS[name])
    logits = compiled(directory(model, tmp_path / "m"), device, torch.float16).logits(TOKENS[:12])
    assert nmse(logits, reference(model)[:12]) <= 1e-5


def quantized(path: Path, codec: str) -> Checkpoint:
    checkpoint = containers.open(path)
    for key, entry in checkpoint.entries.items():
        if len(entry.shape) == 2 and entry.shape[1] % 32 == 0 and "gate.weight" not in key:
            q = solve(entry.load().dequantize(), codecs.get(codec))
            checkpoint.entries[key] = entry.as_(codec=q.codec, load=lambda q=q: q)
    return checkpoint


@pytest.mark.parametrize("kernel", ["triton", "decoded"])
@pytest.mark.parametrize(("name", "codec"), [("phi3", "Q4_0"), ("gpt_neox", "int4-g32"), ("qwen3-tied", "Q8_0"),
                                             ("mixtral", "Q4_0")])
def test_few_bits(name: str, codec: str, kernel: str, tmp_path: Path, device: str) -> None:
    """What is fused or stacked is taken apart as it is packed, tables are read by rows."""
    checkpoint = quantized(directory(tiny(MODELS[name]), tmp_path / "m"), codec)
    want = reference(fewbits.load(checkpoint, kernel="decode"))
    assert nmse(compiled(checkpoint, device, kernel=kernel).logits(TOKENS[:9]), want[:9]) <= 1e-11


def test_products_are_joined(path: Path, model: Decoder) -> None:
    """Queries, keys and values are one product, and gate and up."""
    products = [step for step in model.plan._steps if isinstance(step, steps.Multiply)]
    assert [len(step.outs) for step in products] == [3, 1, 2, 1] * 2 + [1]
    adds = [step for step in model.plan._steps if isinstance(step, steps.Add)]
    assert not adds, "all in norms"


def test_sequences_beside_each_other(model: Decoder) -> None:
    """Pieces of prompts beside single tokens, with copies and cuts between them."""
    first, second, third = (model.sequence(80) for _ in range(3))
    want = model.logits(TOKENS[:15])
    with_others = model.step([(first, TOKENS[:8], 2), (second, TOKENS[:5], 5)])
    assert nmse(with_others[0], want[6:8]) <= 1e-11 and nmse(with_others[1], want[:5]) <= 1e-11
    model.step([(third, TOKENS[50:56], 0), (first, TOKENS[8:11], 0), (second, TOKENS[5:7], 0)])
    copied = first.copy(9, capacity=64)
    first.truncate(10)
    found = model.step([(copied, TOKENS[9:10], 1), (first, TOKENS[10:11], 1), (second, TOKENS[7:10], 2)])
    for logits, rows in zip(found, (slice(9, 10), slice(10, 11), slice(8, 10)), strict=True):
        assert nmse(logits, want[rows]) <= 1e-11
    assert (len(copied), len(first), len(second), first.tokens) == (10, 11, 10, TOKENS[:11])
    states = model.step([(first, TOKENS[11:15], 4)], states=True)[0]
    assert nmse(model.head(states), want[11:]) <= 1e-11


def test_longer_than_the_original_context(tmp_path: Path, device: str) -> None:
    """Keys of a sequence that grows beyond it, or is cut below it, are turned again."""
    rope = MODELS["phi3-longrope"].rope_parameters | {"original_max_position_embeddings": 16}
    config = transformers.Phi3Config(**SMALL, pad_token_id=0, original_max_position_embeddings=16,
                                     rope_parameters=rope)
    model = tiny(config)
    made = compiled(directory(model, tmp_path / "m"), device)
    with torch.inference_mode():
        want = {n: model(input_ids=torch.tensor([TOKENS[:n]])).logits[0] for n in (16, 20)}
    assert nmse(want[16][:10], want[20][:10]) > 1e-6
    long, short = made.sequence(20), made.sequence(20)
    long.append(TOKENS[:16])
    both = made.step([(long, TOKENS[16:20], 4), (short, TOKENS[:16], 16)])
    assert nmse(both[0], want[20][16:]) <= 1e-11 and nmse(both[1], want[16]) <= 1e-11
    long.truncate(10)
    assert nmse(long.append(TOKENS[10:16], last_only=False), want[16][10:]) <= 1e-11


def test_calls_are_of_some_tokens(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    want = model.logits(TOKENS[:10])
    monkeypatch.setattr(Gpu, "most", 4)
    monkeypatch.setattr(plan, "SLICE", 3)
    assert nmse(model.logits(TOKENS[:10]), want) <= 1e-11


def test_errors(path: Path, model: Decoder, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FewbitsError, match="a cache of 'q8_0'") as caught:
        model.sequence(10, "q8_0")
    assert caught.value.hint == "there are f16"
    needed = model.plan.cache_bytes(65, "f16")
    assert needed == 2 * 2 * 1 * 128 * 10 * 4  # layers, keys and values, heads, positions, columns, bytes
    monkeypatch.setattr(engine.devices, "free_bytes", lambda _: needed)
    assert model.sequence(65).capacity == 65
    monkeypatch.setattr(engine.devices, "free_bytes", lambda _: needed - 1)
    with pytest.raises(FewbitsError, match="the cache of 65 tokens takes 0.00 GiB"):
        model.sequence(65)
    with pytest.raises(FewbitsError, match="the CPU's decoder computes in float32, not in torch.float16"):
        decoder.compile(containers.open(path), torch.device("cpu"), torch.float16)


def test_memory_that_goes_meanwhile(path: Path, model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words")

    monkeypatch.setattr(engine, "Cache", gone)
    with pytest.raises(NotHere, match="^CUDA out of memory. Tried to allocate 2.00 GiB.$"):
        model.sequence(10)
    monkeypatch.setattr(engine, "floats", gone)
    with pytest.raises(NotHere):
        compiled(path, "cpu")
