"""Chosen tokens and kept sets against naive float64 versions and Transformers' processors."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import transformers

from fewbits.errors import FewbitsError
from fewbits.text.sampling import Sampler, Sampling, largest, logprobs

SIZES = 97, 5000


def rows(size: int, count: int = 5) -> np.ndarray:
    """Random logits, of which some are equal."""
    return np.random.default_rng(size).normal(0, 3, (count, size)).astype(np.float32).round(2)


def naive(logits: np.ndarray, s: Sampling, before: list[int]) -> dict[int, float]:
    """Probabilities of the tokens that are kept, in float64, step by step as the docstring says."""
    x = logits.astype(np.float64)
    for token, value in s.bias.items():
        x[token] += value
    last = before if s.window == -1 else before[len(before) - min(s.window, len(before)):]
    for token in set(last):
        x[token] = x[token] * s.repetition if x[token] <= 0 else x[token] / s.repetition
        x[token] -= last.count(token) * s.frequency + s.presence
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if s.top_k:
        order = order[:s.top_k]
    weights = [math.exp(x[i] - x[order[0]]) for i in order]
    total, sums, kept = sum(weights), 0.0, []
    for token, weight in zip(order, weights, strict=True):
        kept.append(token)
        sums += weight / total
        if sums >= s.top_p:
            break
    kept = [i for i in kept if math.exp(x[i] - x[order[0]]) >= s.min_p]
    scaled = {i: math.exp((x[i] - x[order[0]]) / s.temperature) for i in kept}
    return {i: w / sum(scaled.values()) for i, w in scaled.items()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("s", [
    Sampling(0.7), Sampling(1.0, top_k=5), Sampling(1.3, top_p=0.9), Sampling(0.9, min_p=0.05),
    Sampling(0.8, 40, 0.95, 0.05), Sampling(1.0, 20, repetition=1.3, frequency=0.2, presence=0.5),
    Sampling(1.0, 20, repetition=1.3, window=3), Sampling(1.0, 20, presence=0.5, frequency=-0.5, window=-1),
    Sampling(1.0, 8, bias={3: 9.5, 11: -100.0}), Sampling(2.0, top_p=0.999)],
    ids=["plain", "k", "p", "min-p", "all", "penalties", "window", "whole", "bias", "wide"])
def test_draws_are_those_of_the_naive_version(s: Sampling, size: int) -> None:
    before = [1, 2, 3, 2, 9, 3, 3] * 12
    for logits in rows(size):
        wanted = naive(logits, s, before)
        sampler, same = Sampler(s, size), random.Random(s.seed)
        ordered = list(wanted) if s.top_k or s.top_p < 1 or s.min_p else sorted(wanted)
        parts = np.array([wanted[i] for i in ordered])
        ends = parts.cumsum()
        for _ in range(50):
            u = same.random() * ends[-1]
            near = np.flatnonzero((ends - parts - 1e-6 <= u) & (u <= ends + 1e-6))  # one, or some at a border
            assert sampler.pick(logits, before) in {ordered[i] for i in near}


@pytest.mark.parametrize("size", SIZES)
def test_kept_sets_are_those_of_transformers(size: int) -> None:
    scores = torch.from_numpy(rows(size))
    for s, warper in ((Sampling(1.0, top_k=7), transformers.TopKLogitsWarper(7)),
                      (Sampling(1.0, top_p=0.8), transformers.TopPLogitsWarper(0.8)),
                      (Sampling(1.0, min_p=0.1), transformers.MinPLogitsWarper(0.1))):
        for row, left in zip(scores, warper(torch.zeros(1, 1, dtype=torch.long), scores.clone()), strict=True):
            logits, most = row.numpy(), float(row.max())
            tokens, kept = Sampler(s, size)._kept(logits, most)
            assert tokens is not None and (logits[tokens] == kept).all()
            theirs = set(torch.isfinite(left).nonzero().flatten().tolist())
            if s.top_k:  # theirs keeps all that equal the last one
                assert set(tokens.tolist()) <= theirs and len(tokens) == 7
            elif s.top_p < 1:  # theirs sums float32 probabilities, and among equals takes others
                assert sorted(logits[list(theirs)]) == pytest.approx(sorted(kept))
            else:
                assert set(tokens.tolist()) == theirs


def test_repetition_is_that_of_transformers() -> None:
    scores, before = torch.from_numpy(rows(300)), [5, 7, 7, 200, 5]
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([before] * len(scores)), scores.clone())
    for row, wanted in zip(scores.numpy(), theirs.numpy(), strict=True):
        logits = row.copy()
        Sampler(Sampling(repetition=1.7), 300)._penalize(logits, before)
        np.testing.assert_allclose(logits, wanted, rtol=1e-6)
        assert Sampler(Sampling(repetition=1.7), 300).pick(row, before) == int(wanted.argmax())


def test_largest() -> None:
    logits = np.array([1, 3, 2, 3, 3, -math.inf, 2], np.float32)
    assert [largest(logits, n).tolist() for n in (1, 2, 4, 7)] == [
        [1], [1, 3], [1, 3, 4, 2], [1, 3, 4, 2, 6, 0, 5]]


def test_log_probabilities() -> None:
    for logits in rows(5000):
        wanted = torch.from_numpy(logits).double().log_softmax(0)
        chosen, likely = logprobs(logits, 17, 3)
        assert chosen.token == 17 and chosen.logprob == pytest.approx(float(wanted[17]), abs=1e-5)
        assert [c.token for c in likely] == largest(logits, 3).tolist()
        assert [c.logprob for c in likely] == pytest.approx([float(wanted[c.token]) for c in likely], abs=1e-5)
    assert logprobs(logits, 17, 0)[1] == []


def test_masks_and_what_is_left() -> None:
    logits = np.array([5, 4, 3, -math.inf], np.float32)
    allowed = np.array([False, True, True, True])
    assert Sampler(Sampling(), 4).pick(logits, allowed=allowed) == 1
    assert {Sampler(Sampling(1.0, seed=i), 4).pick(logits, allowed=allowed) for i in range(40)} == {1, 2}
    assert logits[0] == 5, "the caller's logits are not changed"
    with pytest.raises(FewbitsError, match="no token that the grammar allows"):
        Sampler(Sampling(), 4).pick(logits, allowed=np.array([False, False, False, True]))
    for bad in (math.nan, math.inf):
        with pytest.raises(FewbitsError, match="not finite"):
            Sampler(Sampling(), 2).pick(np.array([0, bad], np.float32))


def test_a_tiny_temperature_is_greedy() -> None:
    logits = rows(97)[0]
    assert Sampler(Sampling(1e-300), 97).pick(logits) == int(logits.argmax())


def test_ahead_draws_what_comes_next() -> None:
    logits, sampler = rows(97)[0], Sampler(Sampling(1.5, seed=3), 97)
    sampler.pick(logits)
    ahead = sampler.ahead()
    assert [ahead.pick(logits) for _ in range(9)] == [sampler.pick(logits) for _ in range(9)]


@pytest.mark.parametrize("change,message", [
    ({"temperature": -1.0}, "temperature -1.0"), ({"temperature": math.nan}, "temperature nan"),
    ({"top_p": 0.0}, "top-p 0.0"), ({"min_p": 2.0}, "min-p 2.0"), ({"repetition": 0.0}, "repetition penalty 0.0"),
    ({"top_k": -1}, "top-k -1"), ({"window": -2}, "penalty window -2"), ({"presence": math.inf}, "presence penalty")])
def test_impossible_settings(change: dict, message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        Sampling(**change)


def test_bias_of_no_token() -> None:
    with pytest.raises(FewbitsError, match="token 97, of a vocabulary of 97"):
        Sampler(Sampling(bias={97: 1.0}), 97)
