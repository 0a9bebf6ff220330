"""Text from a model, piece by piece: the native decoder where it knows the model, else Transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fewbits import containers, hub
from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError
from fewbits.runtime.engine import CACHES
from fewbits.text.grammar import Grammar
from fewbits.text.guessing import MOST, Draft, Guesser, Lookup, common
from fewbits.text.sampling import Sampler, Sampling, logprobs
from fewbits.text.streaming import Stream
from fewbits.text.tokenizer import tokenizer

Ended = Literal["stop", "stop string", "length", "context", "interrupted"]
ROOM = 4096  # tokens that a conversation has room for at first


@dataclass(frozen=True)
class Token:
    """A token with the logarithm of its probability, and the most likely ones in its place."""

    token: int
    text: str
    logprob: float
    top: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What was generated, why it ended, and how fast."""

    text: str
    tokens: list[int]
    ended: Ended
    prompt_tokens: int
    reused_tokens: int  # of the prompt: they were known from the text before
    guessed_tokens: int  # by a draft model or from the text, and how many of them were right
    accepted_tokens: int
    prompt_seconds: float
    answer_seconds: float  # after the first token's logits were known
    logprobs: list[Token] | None = None

    @property
    def prompt_rate(self) -> float:
        """Tokens a second."""
        return (self.prompt_tokens - self.reused_tokens) / max(self.prompt_seconds, 1e-9)

    @property
    def answer_rate(self) -> float:
        """Tokens a second; the first one's time is the prompt's."""
        return max(len(self.tokens) - 1, 0) / max(self.answer_seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"prompt_tokens_per_second": self.prompt_rate,
                               "answer_tokens_per_second": self.answer_rate}


class Session:
    """A model and its tokenizer, ready to talk. It keeps what it computed of the last text, for one that goes on."""

    def __init__(self, model: str | Path | Checkpoint, kernel: str | None = None, *, context: int | None = None,
                 cache: str = "f16", draft: str | Path | None = None, device: str = "auto"):
        """Open a model; `kernel` has Transformers compute with products of that name.

        `device` is the GPU if there is one that has room, else the CPU; or one that is named. A `kernel` is the CPU's
        unless one is named.

        `context` limits prompt and answer together, `cache` is the type of the keys and values that are kept, and
        `draft` is a smaller model that guesses ahead.

        Raises:
            FewbitsError: nothing readable there, or a context longer than the model's.
        """
        self.checkpoint = model if isinstance(model, Checkpoint) else containers.open(hub.locate(model))
        self.tokenizer = tokenizer(self.checkpoint)
        if cache not in CACHES:
            raise FewbitsError(f"unknown type of cache {cache!r}", "one of: " + ", ".join(CACHES))
        if device == "auto" and (kernel or cache != "f16"):
            device = "cpu"  # which has those
        self.device = device
        self.model, self.native = _model(self.checkpoint, kernel, device)
        if not self.native and cache != "f16":
            raise FewbitsError(f"{self.checkpoint.path}: a cache in {cache} is the native decoder's, which does not "
                               "compute this model", "go without --cache")
        if self.native and cache not in self.model.engine.caches:
            raise FewbitsError(f"a cache in {cache} is not on the GPU yet",
                               f"there is {', '.join(self.model.engine.caches)}, or --device cpu")
        if context is not None and not 1 <= context <= self.model.context:
            raise FewbitsError(f"a context of {context} tokens, the model's is {self.model.context}")
        self.context, self.cache = context or self.model.context, cache
        self._draft = draft
        self._sequence: Any = None
        self._room = 0
        self._tokens: list[int] = []  # the last text; the sequence has the first of them

    # text to tokens ---------------------------------------------------------------------------------------------------
    def encode(self, prompt: str, raw: bool = False, system: str | None = None) -> list[int]:
        """Tokens of a prompt, wrapped in the chat template where there is one, unless `raw`."""
        if raw or self.tokenizer.templates is None:
            if system:
                raise FewbitsError("a system prompt needs a chat template", "put it before the prompt")
            return self.tokenizer.encode(prompt)
        before = [{"role": "system", "content": system}] if system else []
        return self.encode_chat([*before, {"role": "user", "content": prompt}])

    def check_chat(self) -> None:
        if self.tokenizer.templates is None:
            raise FewbitsError(f"{self.checkpoint.path}: no chat template in it", "use fewbits run --raw")

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation in the chat template, and of what opens an answer."""
        self.check_chat()
        return self.tokenizer.encode_chat(messages)

    # tokens to text ---------------------------------------------------------------------------------------------------
    def grammar(self, kind: str, source: str | dict[str, Any]) -> Grammar:
        """A form for answers: `kind` is "json-schema", "regex", "lark" or "gbnf"."""
        return Grammar(kind, source, self.tokenizer, self.model.vocabulary)

    def generate(self, ids: Sequence[int], *, max_tokens: int = 128, sampling: Sampling | None = None,
                 stop: Sequence[str] = (), grammar: Grammar | None = None, lookup: bool = False,
                 top_logprobs: int | None = None, on_text: Callable[[str], None] | None = None) -> Answer:
        """Continue `ids`; `on_text` gets the new text in whole characters as it comes.

        It ends at a token that ends answers, at one of the `stop` strings, after `max_tokens`, at the end of the
        context, or at Ctrl-C. `lookup` guesses ahead from the text itself, as a session's draft model does: the text
        is the same. `top_logprobs` asks for the logarithms of probabilities, and for so many likely tokens each time.

        Raises:
            FewbitsError: no tokens, or more than the context has.
        """
        ids = list(ids)
        self._check(ids)
        most = min(max_tokens, self.context - len(ids))
        run = _Run(self, Sampler(sampling or Sampling(), self.model.vocabulary), Stream(self.tokenizer, stop),
                   grammar, top_logprobs, on_text or _nobody)
        run.guesser = self._drafter if self._draft else Lookup() if lookup else None
        return run.answer(ids, most, "length" if most == max_tokens else "context")

    def _check(self, ids: list[int]) -> None:
        if not ids:
            raise FewbitsError("the prompt is empty", "say something")
        if len(ids) + 1 > self.context:
            own = self.context == self.model.context
            raise FewbitsError(f"prompt of {len(ids)} tokens, the {'model' if own else 'session'}'s context is "
                               f"{self.context}", "shorten the prompt" if own else
                               f"shorten the prompt, or allow a context of up to {self.model.context}")

    @cached_property
    def _drafter(self) -> Guesser:
        assert self._draft is not None
        small = containers.open(hub.locate(self._draft))
        return Draft(_model(small, None, self.device)[0], tokenizer(small), self.tokenizer, self.context)

    def begin(self, ids: list[int], room: int) -> tuple[Any, int]:
        """The sequence, cut to what it has in common with `ids`, and how many tokens that is."""
        same = min(common(self._tokens, ids[:-1]), 0 if self._sequence is None else len(self._sequence))
        if self._sequence is None or self._room < room:
            self._sequence, self._room = self._made(room, same)
        same = min(same, len(self._sequence))
        self._sequence.truncate(same)
        self._tokens = ids
        return self._sequence, same

    def _made(self, room: int, same: int) -> tuple[Any, int]:
        """A sequence with room for a conversation, if there is memory, but at least for `room` tokens."""
        if not self.native:
            return self.model.sequence(), self.context
        sizes = (min(self.context, max(room, 2 * self._room, ROOM)), room)
        if self._sequence is not None:
            for size in sizes:
                with suppress(FewbitsError):
                    return self._sequence.copy(same, size), size
            self._sequence = None  # gives its memory back; all is computed again
        with suppress(FewbitsError):
            return self.model.sequence(sizes[0], self.cache), sizes[0]
        return self.model.sequence(room, self.cache), room


class _Run:
    """One answer as it comes to be."""

    def __init__(self, session: Session, sampler: Sampler, stream: Stream, grammar: Grammar | None,
                 top: int | None, on_text: Callable[[str], None]):
        self.session, self.sampler, self.stream, self.on_text, self.top = session, sampler, stream, on_text, top
        self.matcher = grammar.begin() if grammar else None
        self.guesser: Guesser | None = None
        self.guessed = self.accepted = 0
        self.logprobs: list[Token] = []

    def answer(self, ids: list[int], most: int, end: Ended) -> Answer:
        began = known = time.monotonic()
        sequence, same = self.session.begin(ids, len(ids) + most)
        text = self.session._tokens = list(ids)
        ended: Ended | None = None
        try:
            rows = sequence.append(ids[same:])[-1:]
            known = time.monotonic()
            guesses: list[int] = []
            while ended is None:
                for token in self._checked(rows, guesses, text):
                    if token in self.session.tokenizer.ends:
                        ended = "stop"
                        break
                    text.append(token)
                    self.on_text(self.stream.push(token))
                    ended = self._ended(len(text) - len(ids) == most, end)
                    if ended:
                        break
                if ended is None:
                    sequence.truncate(len(text) - 1)
                    guesses = self._guesses(text, most - (len(text) - len(ids)) - 1)
                    rows = sequence.append([text[-1], *guesses], last_only=False)
            self.on_text(self.stream.flush())
        except KeyboardInterrupt:
            ended = "interrupted"
            self.stream.flush()
        finally:
            sequence.truncate(min(len(sequence), len(text) - 1))
        tokens = text[len(ids):]
        return Answer(self.stream.text, tokens, ended or "interrupted", len(ids), same, self.guessed, self.accepted,
                      known - began, time.monotonic() - known, self.logprobs if self.top is not None else None)

    def _checked(self, rows: np.ndarray, guesses: list[int], text: list[int]) -> Iterator[int]:
        """The sampler's tokens after each row, as long as they are the guesses that the next rows depend on."""
        for i, row in enumerate(rows):
            token = self._pick(row, text)
            if self.matcher and token not in self.session.tokenizer.ends:
                self.matcher.accept(token)
            if self.top is not None and token not in self.session.tokenizer.ends:
                self._note(row, token)
            right = i < len(guesses) and guesses[i] == token
            self.accepted += right
            yield token
            if not right:
                return

    def _pick(self, row: np.ndarray, text: list[int]) -> int:
        if self.matcher is None:
            return self.sampler.pick(row, text)
        if self.sampler.sampling.temperature == 0:
            best = self.sampler.pick(row, text)
            if self.matcher.fits(best):
                return best
        return self.sampler.pick(row, text, self.matcher.allowed())

    def _ended(self, full: bool, end: Ended) -> Ended | None:
        if self.stream.stopped is not None:
            return "stop string"
        if self.matcher and self.matcher.complete:
            return "stop"
        return end if full else None

    def _guesses(self, text: list[int], room: int) -> list[int]:
        if self.guesser is None or room < 1:
            return []
        found = self.guesser.guess(text, min(MOST, room), self.sampler)
        found = found[:next((i for i, t in enumerate(found) if t >= self.session.model.vocabulary), len(found))]
        self.guessed += len(found)
        return found

    def _note(self, row: np.ndarray, token: int) -> None:
        chosen, likely = logprobs(row, token, self.top or 0)
        one = self.session.tokenizer
        self.logprobs.append(Token(chosen.token, one.decode([chosen.token]), chosen.logprob, tuple(
            Token(c.token, one.decode([c.token]), c.logprob) for c in likely)))


def _model(checkpoint: Checkpoint, kernel: str | None, device: str) -> tuple[Any, bool]:
    """What computes, and whether it is the decoder."""
    if kernel is None:
        from fewbits.runtime import decoder

        made = decoder.compile_or_say(checkpoint, device)
        if made is not None:
            return made, True
    from fewbits.loading import load
    from fewbits.runtime import engine
    from fewbits.runtime.eager import Eager

    return Eager(engine.placed(device, lambda where: load(checkpoint, kernel=kernel, device=where))), False


def _nobody(_: str) -> None:
    pass
