"""Guesses at the next tokens, which the model then checks all at once.

A guess is kept while it is the token that the model's sampler draws, so the text is the one without guesses; a batch of
tokens has the same logits as one at a time (docs/concepts/decoder.md says when).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from fewbits.errors import FewbitsError
from fewbits.text.core import same
from fewbits.text.sampling import Sampler
from fewbits.text.tokenizer import Tokenizer

SHORTEST, LONGEST = 2, 4  # tokens that have to stand somewhere before as they do at the end
MOST = 8  # guesses at a time
SURE = 0.4  # probability below which a draft model's guess is not worth checking


class Guesser(Protocol):
    def guess(self, tokens: Sequence[int], most: int, sampler: Sampler) -> list[int]:
        """At most `most` tokens that may follow `tokens`."""


class Lookup:
    """What followed the same few tokens before, in the prompt or the answer."""

    def __init__(self) -> None:
        self._seen: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> what follows its latest occurrence but the last

    def guess(self, tokens: Sequence[int], most: int, sampler: Sampler) -> list[int]:
        if self._seen != tokens[:len(self._seen)]:
            self._seen, self._after = [], {}
        for end in range(len(self._seen) + 1, len(tokens)):
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(tokens[end - n:end])] = end
        self._seen = list(tokens[:-1])
        for n in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            found = self._after.get(tuple(tokens[-n:]))
            if found is not None:
                return list(tokens[found:found + most])
        return []


class Draft:
    """What a smaller model with the same tokens would say, drawn with the random numbers that come next."""

    def __init__(self, model: Any, tokenizer: Tokenizer, of: Tokenizer, context: int):
        """Guesses of `model`, for a model with the tokenizer `of`, in a context of so many tokens.

        Raises:
            FewbitsError: the two write tokens differently.
        """
        if not same(tokenizer.core, of.core):
            raise FewbitsError("the draft model has another vocabulary", "take a smaller model of the same family")
        self._vocabulary = model.vocabulary
        self._sequence = model.sequence(min(context, model.context))
        self._context = min(context, model.context)
        self._held: list[int] = []

    def guess(self, tokens: Sequence[int], most: int, sampler: Sampler) -> list[int]:
        known = min(common(self._held, tokens[:-1]), len(self._sequence))
        feed = list(tokens[known:])
        if len(tokens) + most > self._context or max(feed) >= self._vocabulary:
            return []
        self._sequence.truncate(known)
        self._held, guesses, ahead = list(tokens), list[int](), sampler.ahead()
        while len(guesses) < most:
            row = np.asarray(self._sequence.append(feed))[-1]
            token = ahead.pick(row, [*tokens, *guesses] if sampler.sampling.penalizes else ())
            if 1 / float(np.exp(row - row[token]).sum(dtype=np.float64)) < SURE:
                break
            guesses.append(token)
            feed = [token]
        self._held = [*tokens, *guesses][:len(self._sequence)]
        return guesses


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with together."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


