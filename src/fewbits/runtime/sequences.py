"""Sequences of tokens that a compiled decoder runs through, each with a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

import numpy as np

from fewbits import _native
from fewbits.errors import FewbitsError
from fewbits.instructions import threads
from fewbits.planning import available_bytes

Array = np.ndarray


class Decoder:
    """A compiled model. Weights are held once; every sequence has a cache of its own."""

    def __init__(self, plan: _native.Plan, vocabulary: int, context: int, original: int = 0):
        self.plan, self.vocabulary, self.context = plan, vocabulary, context
        self.original = original  # positions beyond which a sequence is turned by stretched frequencies; 0: none

    def logits(self, tokens: Tokens[int], last_only: bool = False) -> Array:
        """Logits `[tokens, vocabulary]`, float32; of the last token alone, `[1, vocabulary]`, if `last_only`."""
        return self.sequence(max(1, len(tokens))).append(tokens, last_only)

    def sequence(self, capacity: int | None = None) -> Sequence:
        """An empty sequence with room for `capacity` tokens, by default for the model's whole context.

        Raises:
            FewbitsError: more than the model's context, or its cache does not fit into the free memory.
        """
        capacity = self.context if capacity is None else capacity
        if not 1 <= capacity <= self.context:
            raise FewbitsError(f"room for {capacity} tokens, the model's context is 1 to {self.context}")
        needed, free = self.plan.cache_bytes(capacity), available_bytes()
        if needed > free:
            raise FewbitsError(f"the cache of {capacity} tokens takes {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB "
                               "are free", "ask for fewer tokens")
        return Sequence(self, _native.Cache(self.plan, capacity))


class Sequence:
    """A sequence of tokens and the keys and values of all of them."""

    def __init__(self, decoder: Decoder, native: _native.Cache):
        self.decoder, self._native = decoder, native
        self._tokens = np.empty(0, np.int64)  # kept where a longer sequence is computed again

    def __len__(self) -> int:
        return self._native.length

    def append(self, tokens: Tokens[int], last_only: bool = True) -> Array:
        """Logits after the last of `tokens`, `[1, vocabulary]`; after each of them unless `last_only`.

        Raises:
            FewbitsError: no tokens, more than there is room for, or one that the vocabulary lacks; nothing was added.
        """
        ids = np.array(tokens, dtype=np.int64)
        self._check(ids)
        wanted = 1 if last_only else len(ids)
        out, before = np.empty((wanted, self.decoder.vocabulary), np.float32), len(self)
        native = self._native
        if self.decoder.original:
            together = np.concatenate([self._tokens[:before], ids])
            if (len(together) > self.decoder.original) != native.stretched:  # its keys were turned otherwise
                native, ids = _native.Cache(self.decoder.plan, native.capacity), together
                native.stretched = not self._native.stretched
        try:
            for at in range(0, len(ids), _native.MOST_TOKENS):
                part = ids[at:at + _native.MOST_TOKENS]
                begin, end = (max(0, i - (len(ids) - wanted)) for i in (at, at + len(part)))
                native.append(part, out[begin:end], threads())
        except BaseException:  # an interrupt between two parts
            if native is self._native:
                native.truncate(before)
            raise
        self._native = native
        if self.decoder.original:
            self._tokens = together
        return out

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            FewbitsError: there are fewer.
        """
        if not 0 <= length <= len(self):
            raise FewbitsError(f"a sequence of {len(self)} tokens cannot be cut to {length}")
        self._native.truncate(length)

    def _check(self, ids: Array) -> None:
        if not len(ids):
            raise FewbitsError("no tokens to append")
        if len(self) + len(ids) > self._native.capacity:
            before = f" after {len(self)}" if len(self) else ""
            raise FewbitsError(f"prompt of {len(ids)} tokens{before}, context {self._native.capacity}",
                               "shorten the prompt or make room for more tokens")
        for wrong in ids[(ids < 0) | (ids >= self.decoder.vocabulary)].tolist()[:1]:
            raise FewbitsError(f"token {wrong} is not in the vocabulary of {self.decoder.vocabulary}")


