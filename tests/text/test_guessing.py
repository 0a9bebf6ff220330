"""What is guessed, and that it never changes a text (tests/test_generate.py has whole answers)."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fewbits import containers
from fewbits.errors import FewbitsError
from fewbits.runtime import decoder
from fewbits.text.guessing import LONGEST, SHORTEST, Draft, Lookup, common
from fewbits.text.sampling import Sampler, Sampling
from fewbits.text.tokenizer import tokenizer

GREEDY = Sampler(Sampling(), 10)


def naive(tokens: list[int], most: int) -> list[int]:
    """What follows the latest earlier occurrence of the longest run of tokens at the end."""
    for n in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n:end] == tokens[-n:]:
                return tokens[end:end + most]
    return []


def test_lookup_equals_a_search() -> None:
    rng = random.Random(0)
    for _ in range(30):
        lookup, tokens = Lookup(), [rng.randrange(3) for _ in range(rng.randrange(1, 9))]
        for _ in range(60):
            assert lookup.guess(tokens, 5, GREEDY) == naive(tokens, 5)
            tokens += [rng.randrange(3) for _ in range(rng.randrange(1, 4))]
            if rng.random() < 0.05:
                tokens = tokens[:len(tokens) // 2]


def test_common() -> None:
    assert [common(a, b) for a, b in (([], []), ([1], []), ([1, 2], [1, 3]), ([1, 2], [1, 2, 3]))] == [0, 0, 1, 2]


def test_draft_says_what_its_model_would(shared) -> None:
    """Sampled as the larger model will: with the numbers that come next. It may stop where it is not sure."""
    checkpoint = containers.open(shared("models/stories260k"))
    model, words = decoder.compile(checkpoint), tokenizer(checkpoint)
    draft = Draft(model, words, words, 200)
    tokens, rng, count = words.encode("Once upon a time"), random.Random(1), 0
    for temperature in (0.0, 0.02, 1.0):
        for _ in range(6):
            sampler = Sampler(Sampling(temperature, seed=4), model.vocabulary)
            guesses, after = draft.guess(tokens, 4, sampler), list(tokens)
            for guess in guesses:
                row = np.asarray(model.logits(after, last_only=True))[-1]
                assert sampler.pick(row) == guess
                after.append(guess)
                count += 1
            tokens = after[:len(after) - rng.randrange(2)] + [rng.randrange(3, 200)]
            if rng.random() < 0.3:
                tokens = tokens[:len(tokens) // 2 + 1]
    assert count > 9
    assert draft.guess([5] * 198, 4, GREEDY) == [], "no room"


def test_draft_of_another_vocabulary(tiny, shared) -> None:
    one, other = containers.open(tiny), containers.open(shared("models/stories260k"))
    with pytest.raises(FewbitsError, match="another vocabulary"):
        Draft(decoder.compile(other), tokenizer(other), tokenizer(one), 64)
