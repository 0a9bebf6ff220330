"""The next token of a text, from its logits.

The order is llama.cpp's: logit bias, penalties (repetition, then frequency and presence, each for the tokens among the
last `window` of prompt and answer), a grammar's mask, top-k, top-p, min-p, temperature, draw. What top-p and min-p keep
depends on the logits before the temperature; Transformers applies the temperature first.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

import numpy as np

from fewbits.errors import FewbitsError

Logits = np.ndarray  # float32 [vocabulary]
FIRST = 256  # tokens that are sorted for top-p before it is tried with more


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the most likely one; what has no effect is switched off."""

    temperature: float = 0.0
    top_k: int = 0  # keep so many of the most likely, 0: all
    top_p: float = 1.0  # keep the fewest of the most likely that have this probability together
    min_p: float = 0.0  # keep what has this part of the largest probability
    repetition: float = 1.0  # divides positive logits of tokens that occurred, multiplies negative ones
    frequency: float = 0.0  # is taken from a logit for every time the token occurred
    presence: float = 0.0  # is taken from a logit if the token occurred
    window: int = 64  # tokens that penalties look back, -1: all
    bias: dict[int, float] = field(default_factory=dict)  # added to logits, by token
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, range_ in (
                ("temperature", self.temperature >= 0, "0 or more"), ("top-k", self.top_k >= 0, "0 or more"),
                ("top-p", 0 < self.top_p <= 1, "above 0, and at most 1"), ("min-p", 0 <= self.min_p <= 1, "0 to 1"),
                ("repetition penalty", self.repetition > 0, "above 0"),
                ("frequency penalty", math.isfinite(self.frequency), "a number"),
                ("presence penalty", math.isfinite(self.presence), "a number"),
                ("penalty window", self.window >= -1, "-1 or more")):
            if not good:
                value = getattr(self, name.removesuffix(" penalty").removeprefix("penalty ").replace("-", "_"))
                raise FewbitsError(f"{name} {value} is not possible", f"it is {range_}")

    @property
    def penalizes(self) -> bool:
        return self.window != 0 and (self.repetition != 1 or self.frequency != 0 or self.presence != 0)


@dataclass(frozen=True)
class Chosen:
    """A token with the logarithm of its probability, as the model has it: before bias, penalties and the rest."""

    token: int
    logprob: float


class Sampler:
    """Draws tokens one after the other; the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling, vocabulary: int):
        self.sampling = sampling
        self._random = random.Random(sampling.seed)
        wrong = [token for token in sampling.bias if not 0 <= token < vocabulary]
        if wrong:
            raise FewbitsError(f"logit bias for token {wrong[0]}, of a vocabulary of {vocabulary}")
        self._biased = np.array(list(sampling.bias), np.int64)
        self._bias = np.array(list(sampling.bias.values()), np.float32)

    def pick(self, logits: Logits, before: Sequence[int] = (), allowed: np.ndarray | None = None) -> int:
        """A token after the tokens `before`; among those that `allowed`, booleans `[vocabulary]`, has, if given.

        Every call takes one number of the seed's, or none at temperature 0.

        Raises:
            FewbitsError: no token is left that has a finite logit.
        """
        s = self.sampling
        if s.bias or s.penalizes or allowed is not None:
            logits = np.array(logits, np.float32)
            logits[self._biased] += self._bias
            if s.penalizes:
                self._penalize(logits, before)
            if allowed is not None:
                logits[~allowed] = -np.inf
        best = int(logits.argmax())
        most = float(logits[best])
        if not math.isfinite(most):
            raise FewbitsError("no token can follow: the logits are not finite" if allowed is None else
                               "no token that the grammar allows has a finite logit")
        if s.temperature == 0:
            return best
        tokens, kept = self._kept(logits, most)
        with np.errstate(over="ignore"):  # of temperatures near 0
            weights = np.exp((kept.astype(np.float64) - most) / s.temperature)
        sums = weights.cumsum()
        at = min(int(np.searchsorted(sums, self._random.random() * sums[-1], "right")), len(sums) - 1)
        return int(tokens[at]) if tokens is not None else at

    def ahead(self) -> Sampler:
        """A sampler that draws what this one will, from the logits of another model."""
        other = copy(self)
        other._random = random.Random()
        other._random.setstate(self._random.getstate())
        return other

    def _penalize(self, logits: Logits, before: Sequence[int]) -> None:
        s = self.sampling
        counts = Counter(before[max(0, len(before) - s.window):] if s.window > 0 else before)
        tokens = np.array(list(counts), np.int64)
        times = np.array(list(counts.values()), np.float32)
        found = logits[tokens]
        found = np.where(found <= 0, found * np.float32(s.repetition), found / np.float32(s.repetition))
        logits[tokens] = found - times * np.float32(s.frequency) - np.float32(s.presence)

    def _kept(self, logits: Logits, most: float) -> tuple[np.ndarray | None, Logits]:
        """Tokens that top-k, top-p and min-p leave, the most likely first, and their logits; None: all, in order."""
        s = self.sampling
        tokens, kept = None, logits
        if 0 < s.top_k < len(logits):
            tokens = largest(logits, s.top_k)
            kept = logits[tokens]
        if s.top_p < 1:
            total = float(np.exp(kept - np.float32(most)).sum(dtype=np.float64))
            tokens, kept = self._top_p(logits, tokens, most, total)
        if s.min_p > 0:
            least = most + math.log(s.min_p)
            if tokens is None:
                tokens = np.flatnonzero(logits >= least)
                tokens = tokens[np.lexsort((tokens, -logits[tokens]))]
            else:
                tokens = tokens[kept >= least]
            kept = logits[tokens]
        return tokens, kept

    def _top_p(self, logits: Logits, tokens: np.ndarray | None, most: float, total: float) -> tuple[np.ndarray, Logits]:
        among = len(logits) if tokens is None else len(tokens)
        size = min(FIRST, among) if tokens is None else among
        while True:
            found = largest(logits, size) if tokens is None else tokens
            sums = np.exp(logits[found].astype(np.float64) - most).cumsum()
            enough = int(np.searchsorted(sums, self.sampling.top_p * total, "left")) + 1
            if enough <= size or size == among:
                return found[:enough], logits[found[:enough]]
            size = min(size * 8, among)


def largest(logits: Logits, count: int) -> np.ndarray:
    """The `count` tokens of largest logit, the largest first, the first token first among equals."""
    if count < len(logits):
        least = np.partition(logits, len(logits) - count)[len(logits) - count]
        above = np.flatnonzero(logits > least)
        ties = np.flatnonzero(logits == least)[:count - len(above)]
        found = np.concatenate([above, ties])
    else:
        found = np.arange(len(logits))
    return found[np.lexsort((found, -logits[found]))]


def logprobs(logits: Logits, token: int, count: int) -> tuple[Chosen, list[Chosen]]:
    """The chosen token and the `count` most likely ones, with the logarithms of their probabilities."""
    most = float(logits.max())
    total = most + math.log(float(np.exp(logits - np.float32(most)).sum(dtype=np.float64)))

    def one(i: int) -> Chosen:
        return Chosen(int(i), float(logits[i]) - total)

    return one(token), [one(i) for i in largest(logits, min(count, len(logits)))] if count else []
