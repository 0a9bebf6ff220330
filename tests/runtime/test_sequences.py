"""Several sequences in a call, prefixes, caches of fewer bits: the logits of one sequence alone, bit for bit."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fewbits import _native, codecs, containers
from fewbits.errors import FewbitsError
from fewbits.runtime import decoder, engine, sequences
from fewbits.runtime.engine import CACHES
from fewbits.runtime.sequences import Decoder, Sequence
from fewbits.solvers import solve
from tests.arch.models import VOCAB, directory, tiny

SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096}
CONFIGS = {"plain": transformers.MistralConfig(**SIZES, sliding_window=None),
           "windows": transformers.MistralConfig(**SIZES, sliding_window=24)}
TOKENS = torch.randint(VOCAB, (2200,), generator=torch.Generator().manual_seed(1)).tolist()
# normalised squared error of logits beside float16, measured on random models: 1.8e-4 and 7e-3
LOSSES = {"q8_0": 5e-4, "q4_0": 3e-2}


def made(kind: str, codec: str | None, path: Path) -> Decoder:
    checkpoint = containers.open(directory(tiny(CONFIGS[kind]), path))
    for name, entry in checkpoint.entries.items():
        if codec and len(entry.shape) == 2:
            q = solve(entry.load().dequantize(), codecs.get(codec))
            checkpoint.entries[name] = type(entry)(**(vars(entry) | {"codec": q.codec, "load": lambda q=q: q}))
    return decoder.compile(checkpoint)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return made("plain", "Q4_0", tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return made("windows", None, tmp_path_factory.mktemp("windows") / "m")


@pytest.fixture(params=["model", "windows"])
def either(request: pytest.FixtureRequest) -> Decoder:
    return request.getfixturevalue(request.param)


def grown(model: Decoder, tokens: list[int], capacity: int = 256, cache: str = "f16") -> Sequence:
    sequence = model.sequence(capacity, cache)
    sequence.append(tokens)
    return sequence


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    return float(((got.astype(float) - want) ** 2).sum() / (want.astype(float) ** 2).sum())


@pytest.mark.parametrize("cache", CACHES)
def test_at_once_in_parts_and_one_by_one_are_the_same_bits(either: Decoder, cache: str, instructions: str) -> None:
    tokens = TOKENS[:90]
    want = either.sequence(90, cache).append(tokens, last_only=False)
    single = either.sequence(90, cache)
    assert np.array_equal(np.concatenate([single.append([token]) for token in tokens]), want)
    parts, split = either.sequence(90, cache), np.split(tokens, np.cumsum([3, 17, 5, 16, 2, 30]))
    assert np.array_equal(np.concatenate([parts.append(part.tolist(), False) for part in split]), want)


@pytest.mark.parametrize("threads", [1, 3])
def test_sequences_join_and_leave(either: Decoder, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's steps: prompts in pieces beside single tokens, caches of all kinds; each as it is alone."""
    dice = random.Random(7)
    jobs = [(TOKENS[i * 40:i * 40 + dice.randrange(5, 120)], CACHES[i % 3]) for i in range(9)]
    want = [either.sequence(128, cache).append(tokens, last_only=False) for tokens, cache in jobs]
    monkeypatch.setattr(sequences, "threads", lambda: threads)
    waiting = list(range(len(jobs)))
    live: dict[int, Sequence] = {}
    steps = 0
    while waiting or live:
        while waiting and len(live) < 4:
            i = waiting.pop(0)
            live[i] = either.sequence(128, jobs[i][1])
        asked, rows = [], []
        for i, sequence in live.items():
            tokens = jobs[i][0][len(sequence):][:dice.choice([1, 1, 2, 30])]
            wanted = dice.randrange(len(tokens) + 1)
            asked.append((sequence, tokens, wanted))
            rows.append(want[i][:len(sequence) + len(tokens)][len(sequence) + len(tokens) - wanted:])
        for got, right in zip(either.step(asked), rows, strict=True):
            assert np.array_equal(got, right)
        live = {i: s for i, s in live.items() if len(s) < len(jobs[i][0])}
        steps += 1
    assert steps > 10


def test_last_hidden_states_give_the_same_logits(model: Decoder) -> None:
    prompts, wanted = [TOKENS[:600], TOKENS[100:140]], [590, 3]

    def asked() -> list[tuple[sequences.Sequence, list[int], int]]:
        return [(model.sequence(900), p, n) for p, n in zip(prompts, wanted, strict=True)]

    logits, states = model.step(asked()), model.step(asked(), states=True)
    for found, right, count in zip(states, logits, wanted, strict=True):
        assert found.shape == (count, model.hidden)
        assert np.array_equal(model.head(found), right)
    assert model.head(states[0][:0]).shape == (0, model.vocabulary)


def counted(calls: list[int]) -> Callable[..., int]:
    call = Decoder._call

    def counting(self: Decoder, pieces: Any, parts: list[sequences.Part], out: Any, states: bool) -> int:
        calls.append(sum(end - begin for _, begin, end in parts))
        return call(self, pieces, parts, out, states)

    return counting


def test_many_tokens_of_several_sequences(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [TOKENS[:30], TOKENS[100:900], TOKENS[50:51], TOKENS[:513]]
    wanted = [30, 600, 1, 0]
    want = [model.sequence(900).append(p, last_only=False) for p in prompts]
    calls: list[int] = []
    several = [model.sequence(900) for _ in prompts]
    monkeypatch.setattr(Decoder, "_call", counted(calls))
    outs = model.step(list(zip(several, prompts, wanted, strict=True)))
    assert calls == [512, 512, 320]
    for out, right, count in zip(outs, want, wanted, strict=True):
        assert np.array_equal(out, right[len(right) - count:])
    assert [s.tokens for s in several] == prompts


def test_more_queries_for_a_key_than_go_together(tmp_path: Path) -> None:
    config = SIZES | {"hidden_size": 200, "num_attention_heads": 50, "num_key_value_heads": 1, "head_dim": 8}
    hf = tiny(transformers.LlamaConfig(**config))
    several = decoder.compile(containers.open(directory(hf, tmp_path / "m")))
    with torch.inference_mode():
        want = hf(input_ids=torch.tensor([TOKENS[:70]])).logits[0].numpy()
    got = several.logits(TOKENS[:70])
    assert nmse(got, want) <= 1e-6
    single = several.sequence(70)
    assert np.array_equal(np.concatenate([single.append([token]) for token in TOKENS[:70]]), got)


def test_threads_share_a_long_context(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = grown(model, TOKENS[:2100], 2200)
    alone = sequence.append([5])
    sequence.truncate(2100)
    monkeypatch.setattr(sequences, "threads", lambda: 3)
    assert np.array_equal(sequence.append([5]), alone)
    other = model.sequence(2200)
    fork = sequence.copy()
    assert np.array_equal(model.step([(other, TOKENS[:2100], 0), (sequence, [6], 1)])[1], fork.append([6]))
    assert np.array_equal(other.append([5]), alone)


def test_2000_tokens_stay_what_they_are_at_once(model: Decoder) -> None:
    """No drift, and no memory but the cache's."""
    sequence = grown(model, TOKENS[:4], 2048)
    logits, last = sequence.append([7]), []
    for i in range(1995):
        if i == 100:
            gc.collect()
            before, held = anonymous(), sequence.used_bytes
        logits = sequence.append([int(logits.argmax())] if i % 3 else [TOKENS[i]])
        last.append(logits)
    gc.collect()
    grew = anonymous() - before - (sequence.used_bytes - held) - 1895 * VOCAB * 4  # what `last` holds
    whole = model.sequence(2048)
    want = whole.append(sequence.tokens, last_only=False)
    assert np.array_equal(np.concatenate(last[-200:]), want[-200:])
    assert grew < 2 << 20


def anonymous() -> int:
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the system does not say what memory a process takes")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def test_room_takes_no_memory_before_it_is_used(model: Decoder) -> None:
    before = anonymous()
    many = [model.sequence(4096) for _ in range(20)]
    for sequence in many:
        sequence.append(TOKENS[:5])
    assert sum(s.cache_bytes for s in many) > 38 << 20
    assert anonymous() - before < 12 << 20  # measured: 2.6 MB: 16 pages each


@pytest.mark.parametrize("cache", CACHES)
def test_copies_and_prefixes(either: Decoder, cache: str) -> None:
    sequence = grown(either, TOKENS[:70], 100, cache)
    fork, shorter = sequence.copy(), sequence.copy(37, 50)
    assert (fork.capacity, shorter.capacity, fork.cache) == (100, 50, cache)
    assert (fork.tokens, shorter.tokens) == (TOKENS[:70], TOKENS[:37])
    whole = either.sequence(100, cache).append(TOKENS[:80], last_only=False)
    assert np.array_equal(fork.append(TOKENS[70:80], False), whole[70:])
    assert np.array_equal(shorter.append(TOKENS[37:50], False), whole[37:50])
    assert len(sequence) == 70
    sequence.truncate(33)
    assert sequence.tokens == TOKENS[:33]
    assert np.array_equal(sequence.append(TOKENS[33:80], False), whole[33:])
    larger = sequence.copy(capacity=200)
    assert np.array_equal(larger.append(TOKENS[80:150]), either.sequence(150, cache).append(TOKENS[:150]))
    assert len(either.sequence(5, cache).copy()) == 0


@pytest.mark.parametrize("cache", ["q8_0", "q4_0"])
def test_caches_of_fewer_bits(model: Decoder, cache: str, instructions: str) -> None:
    want = model.sequence(300).append(TOKENS[:300], last_only=False)
    got = model.sequence(300, cache)
    assert nmse(got.append(TOKENS[:300], last_only=False), want) <= LOSSES[cache]
    bits = {"q8_0": 8.5, "q4_0": 4.5}[cache]
    assert got.cache_bytes == model.sequence(300).cache_bytes * bits / 16


def test_errors_leave_all_sequences(model: Decoder, windows: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = grown(model, TOKENS[:3], 8), grown(model, TOKENS[:4], 8)
    for asked, match in (([(one, [1], 1), (two, [1] * 5, 1)], "sequence 1: prompt of 5 tokens after 4, context 8"),
                         ([(one, [1], 1), (one, [2], 1)], "sequence 1: it is there already"),
                         ([(one, [1], 1), (two, [], 0)], "sequence 1: no tokens to append"),
                         ([(one, [VOCAB], 1), (two, [1], 1)], f"sequence 0: token {VOCAB} is not in the vocabulary"),
                         ([(one, [1], 2)], "logits of 2 tokens are wanted, there are 1"),
                         ([(one, [1], 1), (windows.sequence(4), [1], 1)], "sequence 1: it is another model's")):
        with pytest.raises(FewbitsError, match=match):
            model.step(asked)
    assert (one.tokens, two.tokens) == (TOKENS[:3], TOKENS[:4])
    assert model.step([]) == []
    with pytest.raises(FewbitsError, match="a cache of 'f8'"):
        model.sequence(4, "f8")
    with pytest.raises(FewbitsError, match="a sequence of 3 tokens has no 4 to copy"):
        one.copy(4)
    with pytest.raises(FewbitsError, match="3 tokens to copy, room for 2"):
        one.copy(3, 2)


def test_an_interrupt_leaves_all_sequences(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = grown(model, TOKENS[:3]), grown(model, TOKENS[:4])
    monkeypatch.setattr(_native, "MOST_TOKENS", 8)
    calls = iter([1, 1])

    def interrupted() -> int:
        try:
            return next(calls)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(sequences, "threads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.step([(one, TOKENS[3:13], 1), (two, TOKENS[4:30], 1)])
    monkeypatch.undo()
    assert (len(one), one.tokens, len(two), two.tokens) == (3, TOKENS[:3], 4, TOKENS[:4])
    assert np.array_equal(one.append(TOKENS[3:13]), model.logits(TOKENS[:13], last_only=True))


def test_memory_that_is_promised(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    needed = model.plan.cache_bytes(1000, "f16")
    monkeypatch.setattr(engine, "available_bytes", lambda: 2 * needed + 2 * model.plan.cache_bytes(256, "f16"))
    kept = [model.sequence(1000), model.sequence(1000)]
    with pytest.raises(FewbitsError, match="the cache of 1000 tokens takes 0.00 GiB, 0.00 GiB are free"):
        model.sequence(1000)
    kept.pop()
    model.sequence(1000)


def test_a_real_model_in_every_cache(shared: Callable[[str], Path]) -> None:
    made = decoder.compile(containers.open(shared("models/stories260k")))
    tokens = [t % 512 for t in TOKENS[:200]]
    want = made.sequence(200).append(tokens, last_only=False)
    for cache, loss in LOSSES.items():
        assert nmse(made.sequence(200, cache).append(tokens, last_only=False), want) <= loss
