"""Log-probabilities of endings after a context, which is computed once for all of them."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import Protocol

import numpy as np
import torch

from fewbits.checkpoint import Checkpoint
from fewbits.measure.scoring import Decoded, Scorer, Transformed, log_sums
from fewbits.runtime import sequences
from fewbits.runtime.sequences import Array, Tokens
from fewbits.text.guessing import common

ROWS = 256  # tokens whose logits are there at a time
ROOM = 1024  # tokens that a context has room for at first

Likelihood = tuple[float, bool]  # sum of natural logarithms; whether each token is the most likely one


class Endings(Protocol):
    """Computes them for one model."""

    def likelihoods(self, context: Tokens, endings: Several[Tokens]) -> list[Likelihood]:
        """Of each ending after `context`; neither it nor an ending is empty.

        Raises:
            FewbitsError: logits that are not finite.
        """


def endings(scorer: Scorer) -> Endings:
    """What computes them where `scorer` computes."""
    if isinstance(scorer, Decoded):
        return Native(scorer)
    assert isinstance(scorer, Transformed)
    return Eager(scorer)


class Native:
    """On the native decoder. A context that begins as the last one did goes on from there."""

    def __init__(self, scorer: Decoded):
        self._source, self._decoder = scorer.checkpoint, scorer.model
        self._kept: sequences.Sequence | None = None

    def likelihoods(self, context: Tokens, endings: Several[Tokens]) -> list[Likelihood]:
        kept, first = self._after(context)
        sums = [_Sum(self._source) for _ in endings]
        for one, tokens in zip(sums, endings, strict=True):
            one.add(first, tokens[:1])
        running = [(kept.copy(capacity=len(context) + len(tokens) - 1), one, tokens)
                   for one, tokens in zip(sums, endings, strict=True) if len(tokens) > 1]
        at = 1
        while running:  # so many tokens of each ending at a time
            width = max(1, ROWS // len(running))
            found = self._decoder.step([(sequence, fed := tokens[:-1][at - 1:at - 1 + width], len(fed))
                                        for sequence, _, tokens in running])
            for (_, one, tokens), rows in zip(running, found, strict=True):
                one.add(rows, tokens[at:at + width])
            at += width
            running = [r for r in running if len(r[2]) > at]
        return [one.likelihood for one in sums]

    def _after(self, context: Tokens) -> tuple[sequences.Sequence, Array]:
        """The context's sequence, and the logits after it, `[1, vocabulary]`."""
        kept = self._kept
        same = 0 if kept is None else common(kept.tokens, context[:-1])
        if kept is None or kept.capacity < len(context):
            room = min(self._decoder.context, max(ROOM, 2 * len(context)))
            kept = self._decoder.sequence(room) if kept is None else kept.copy(same, room)
        kept.truncate(same)
        self._kept = kept
        return kept, kept.append(context[same:])


class Eager:
    """On a model of Transformers: context and ending together, some endings at a time."""

    def __init__(self, scorer: Transformed):
        self._source, self._model = scorer.checkpoint, scorer.model

    def likelihoods(self, context: Tokens, endings: Several[Tokens]) -> list[Likelihood]:
        found = []
        for at in range(0, len(endings), 4):
            some = endings[at:at + 4]
            width = max(len(e) for e in some)
            # what stands behind an ending changes nothing before it
            ids = torch.tensor([[*context, *e[:-1], *[context[0]] * (width - len(e))] for e in some])
            with torch.inference_mode():
                logits = self._model(input_ids=ids.to(self._model.device), use_cache=False).logits
            for row, tokens in zip(logits[:, len(context) - 1:].float().cpu().numpy(), some, strict=True):
                one = _Sum(self._source)
                one.add(row[:len(tokens)], tokens)
                found.append(one.likelihood)
        return found


class _Sum:
    """What is known of an ending as its tokens come."""

    def __init__(self, source: Checkpoint):
        self._source, self._sum, self._greedy = source, 0.0, True

    def add(self, logits: Array, tokens: Tokens) -> None:
        """The next `tokens`, each by the logits of its row."""
        sums, tops = log_sums(logits, self._source)
        self._sum += float((logits[np.arange(len(tokens)), tokens] - sums).sum())
        self._greedy &= bool((tops == tokens).all())

    @property
    def likelihood(self) -> Likelihood:
        return self._sum, self._greedy
