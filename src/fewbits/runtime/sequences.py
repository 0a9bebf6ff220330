"""Sequences of tokens that a compiled decoder runs through, each with a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence as Several
from weakref import WeakSet

import numpy as np

from fewbits.errors import FewbitsError
from fewbits.instructions import threads
from fewbits.runtime.engine import Cache, Engine, Plan

Array = np.ndarray
Tokens = Several[int]


class Decoder:
    """A compiled model. Weights are held once; every sequence has a cache of its own."""

    def __init__(self, engine: Engine, plan: Plan, vocabulary: int, hidden: int, context: int, original: int = 0):
        self.engine, self.plan, self.vocabulary, self.hidden, self.context = engine, plan, vocabulary, hidden, context
        self.original = original  # longer sequences are turned by stretched frequencies; 0: none
        self._sequences: WeakSet[Sequence] = WeakSet()

    def logits(self, tokens: Tokens, last_only: bool = False) -> Array:
        """Logits `[tokens, vocabulary]`, float32; of the last token alone, `[1, vocabulary]`, if `last_only`."""
        return self.sequence(max(1, len(tokens))).append(tokens, last_only)

    def sequence(self, capacity: int | None = None, cache: str = "f16") -> Sequence:
        """An empty sequence with room for `capacity` tokens, by default for the model's whole context.

        `cache` says what keys and values are rounded to. Memory is taken as tokens come, not before.

        Raises:
            FewbitsError: more than the model's context, or its cache does not fit into the free memory beside what
                other sequences may still take.
        """
        capacity = self.context if capacity is None else capacity
        if not 1 <= capacity <= self.context:
            raise FewbitsError(f"room for {capacity} tokens, the model's context is 1 to {self.context}")
        if cache not in self.engine.caches:
            raise FewbitsError(f"a cache of {cache!r}", f"there are {', '.join(self.engine.caches)}")
        needed = self.plan.cache_bytes(capacity, cache)
        free = self.engine.free_bytes(s.cache_bytes - s.used_bytes for s in self._sequences)
        if needed > free:
            raise FewbitsError(f"the cache of {capacity} tokens takes {needed / 2**30:.2f} GiB, "
                               f"{max(0, free) / 2**30:.2f} GiB are free", "ask for fewer tokens")
        made = Sequence(self, self.engine.cache(self.plan, capacity, cache), cache)
        self._sequences.add(made)
        return made

    def head(self, states: Array, out: Array | None = None) -> Array:
        """Logits `[tokens, vocabulary]` of last hidden states `[tokens, hidden]`: the same bits as without this detour.

        They go to `out`, float32, where it is given.
        """
        states = np.ascontiguousarray(states, np.float32)
        out = np.empty((len(states), self.vocabulary), np.float32) if out is None else out
        for at in range(0, len(states), self.engine.most):
            end = at + self.engine.most
            self.plan.finish(states[at:end], out[at:end], threads())
        return out

    def step(self, asked: Several[tuple[Sequence, Tokens, int]], states: bool = False) -> list[Array]:
        """Append tokens to several sequences at once; for each, logits after the last `wanted` ones of its tokens.

        `asked` has (sequence, tokens, wanted); the results `[wanted, vocabulary]` come in the same order, with `states`
        the last hidden states `[wanted, hidden]` that `head` takes in place of them. A sequence gets the same logits
        as alone. Sequences may join and leave between steps.

        Raises:
            FewbitsError: a sequence is there twice or is another model's; it has no tokens, more than there is room
                for, or one that the vocabulary lacks. No sequence was changed.
        """
        if not asked:
            return []
        pieces = [(s, np.array(tokens, dtype=np.int64), wanted) for s, tokens, wanted in asked]
        for i, (sequence, ids, wanted) in enumerate(pieces):
            try:
                sequence._check(self, ids, wanted)
                if any(sequence is other for other, _, _ in pieces[:i]):
                    raise FewbitsError("it is there already")
            except FewbitsError as error:
                raise FewbitsError(f"sequence {i}: {error}", error.hint) if len(pieces) > 1 else error from None
        width = self.hidden if states else self.vocabulary
        out = np.empty((sum(wanted for _, _, wanted in pieces), width), np.float32)
        before, done = [(s._kept, len(s)) for s, _, _ in pieces], 0
        try:
            pieces = [(s, s._again(ids), wanted) for s, ids, wanted in pieces]
            for call in _calls([len(ids) for _, ids, _ in pieces], self.engine.most):
                done += self._call(pieces, call, out[done:], states)
            for sequence, ids, _ in pieces:
                sequence._tokens[len(sequence) - len(ids):] = ids.tolist()
        except BaseException:  # an interrupt between two calls
            for (sequence, _, _), (kept, length) in zip(pieces, before, strict=True):
                sequence._kept = kept
                sequence.truncate(length)
            raise
        return np.split(out, np.cumsum([wanted for _, _, wanted in pieces])[:-1])

    def _call(self, pieces: list[tuple[Sequence, Array, int]], call: list[Part], out: Array, states: bool) -> int:
        """One call of the plan: tokens `begin` to `end` of some sequences; how many rows of `out` it filled."""
        wanted = []
        for i, begin, end in call:
            skipped = len(pieces[i][1]) - pieces[i][2]  # tokens whose logits nobody wants
            wanted.append(max(0, end - max(begin, skipped)))
        tokens = np.concatenate([pieces[i][1][begin:end] for i, begin, end in call])
        self.plan.step([pieces[i][0]._kept for i, _, _ in call], [end - begin for _, begin, end in call], wanted,
                       tokens, out[:sum(wanted)], states, threads())
        return sum(wanted)


Part = tuple[int, int, int]  # of a call: a sequence's number, its first token and the one after its last


def _calls(counts: list[int], most: int) -> list[list[Part]]:
    """What calls of up to `most` tokens take of so many tokens each: as few calls as it can be, in order."""
    calls: list[list[Part]] = []
    left = 0
    for i, count in enumerate(counts):
        done = 0
        while done < count:
            if not left:
                calls.append([])
                left = most
            end = min(count, done + left)
            calls[-1].append((i, done, end))
            left, done = left - (end - done), end
    return calls


class Sequence:
    """A sequence of tokens and the keys and values of all of them."""

    def __init__(self, decoder: Decoder, kept: Cache, cache: str):
        self.decoder, self.cache, self._kept = decoder, cache, kept
        self._tokens: list[int] = []

    def __len__(self) -> int:
        return self._kept.length

    @property
    def tokens(self) -> list[int]:
        return self._tokens.copy()

    @property
    def capacity(self) -> int:
        return self._kept.capacity

    @property
    def cache_bytes(self) -> int:
        """What the cache takes when it is full."""
        return self.decoder.plan.cache_bytes(self.capacity, self.cache)

    @property
    def used_bytes(self) -> int:
        return self.decoder.plan.cache_bytes(len(self), self.cache) if len(self) else 0

    def append(self, tokens: Tokens, last_only: bool = True) -> Array:
        """Logits after the last of `tokens`, `[1, vocabulary]`; after each of them unless `last_only`.

        Raises:
            FewbitsError: no tokens, more than there is room for, or one that the vocabulary lacks; nothing was added.
        """
        return self.decoder.step([(self, tokens, 1 if last_only else len(tokens))])[0]

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            FewbitsError: there are fewer.
        """
        if not 0 <= length <= len(self):
            raise FewbitsError(f"a sequence of {len(self)} tokens cannot be cut to {length}")
        self._kept.truncate(length)
        del self._tokens[length:]

    def copy(self, length: int | None = None, capacity: int | None = None) -> Sequence:
        """Another sequence that begins with the first `length` tokens of this one, by default with all.

        It has room for `capacity` tokens, by default for as many as this one: a larger cache is made this way, too.

        Raises:
            FewbitsError: there are fewer tokens or is less room than that; see `Decoder.sequence`.
        """
        length = len(self) if length is None else length
        capacity = self.capacity if capacity is None else capacity
        if not 0 <= length <= len(self):
            raise FewbitsError(f"a sequence of {len(self)} tokens has no {length} to copy")
        if length > capacity:
            raise FewbitsError(f"{length} tokens to copy, room for {capacity}")
        made = self.decoder.sequence(capacity, self.cache)
        if length:
            made._kept.copy(self._kept, length)
            made._tokens = self._tokens[:length]
        return made

    def _again(self, ids: Array) -> Array:
        """What is computed for `ids`: all tokens, if keys that are there were turned for another length."""
        stretched = 0 < self.decoder.original < len(self) + len(ids)
        if stretched == self._kept.stretched:
            return ids
        self._kept = self.decoder.engine.cache(self.decoder.plan, self.capacity, self.cache)
        self._kept.stretched = stretched
        return np.concatenate([np.array(self._tokens, np.int64), ids])

    def _check(self, decoder: Decoder, ids: Array, wanted: int) -> None:
        if self.decoder is not decoder:
            raise FewbitsError("it is another model's")
        if not len(ids):
            raise FewbitsError("no tokens to append")
        if not 0 <= wanted <= len(ids):
            raise FewbitsError(f"logits of {wanted} tokens are wanted, there are {len(ids)}")
        if len(self) + len(ids) > self.capacity:
            before = f" after {len(self)}" if len(self) else ""
            raise FewbitsError(f"prompt of {len(ids)} tokens{before}, context {self.capacity}",
                               "shorten the prompt or make room for more tokens")
        for wrong in ids[(ids < 0) | (ids >= decoder.vocabulary)].tolist()[:1]:
            raise FewbitsError(f"token {wrong} is not in the vocabulary of {decoder.vocabulary}")
