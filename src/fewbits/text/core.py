"""What turns text into tokens: the `tokenizers` library as it is, or over the vocabulary of a mapped GGUF file.

The library takes a vocabulary into tables of its own, a second for 262 144 tokens. Of a GGUF file it normalizes, splits
and decodes, as tokenizer.json would have it; the merging is native, over texts that stay in the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from operator import eq
from typing import Any, Protocol

import numpy as np
import tokenizers

from fewbits import _native
from fewbits.containers import gguf_tokenizer
from fewbits.containers.gguf_file import Value
from fewbits.containers.gguf_strings import Strings
from fewbits.containers.gguf_tokenizer import KEY, NORMAL, UNUSED, Json
from fewbits.errors import FewbitsError

PIECE, ADDED = 1, 2  # kinds of tokens, bits


class Core(Protocol):
    def encode(self, text: str, special: bool) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...
    def id(self, token: str) -> int | None: ...
    def name(self, token: int) -> str: ...
    def special(self) -> dict[str, int]:
        """Added tokens that have no text."""
    def size(self) -> int:
        """One more than the largest id."""
    def names(self) -> Iterable[str]:
        """All tokens, by their ids."""
    def library(self) -> tokenizers.Tokenizer: ...


class Library:
    """The library's tokenizer."""

    def __init__(self, core: tokenizers.Tokenizer):
        core.no_padding()
        core.no_truncation()
        self.core = core

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self.core.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.core.decode(tokens, skip_special_tokens=True))

    def id(self, token: str) -> int | None:
        found: int | None = self.core.token_to_id(token)
        return found

    def name(self, token: int) -> str:
        return self.core.id_to_token(token) or ""

    def special(self) -> dict[str, int]:
        return {token.content: i for i, token in self.core.get_added_tokens_decoder().items() if token.special}

    def size(self) -> int:
        return 1 + max(self.core.get_vocab().values(), default=-1)

    def names(self) -> Iterable[str]:
        return map(self.name, range(self.size()))

    def library(self) -> tokenizers.Tokenizer:
        return self.core


class Mapped:
    """The tokenizer of a GGUF file's metadata.

    Raises:
        FewbitsError: a tokenizer model or pre-tokenizer that is not in the table, or lists that don't fit together.
    """

    def __init__(self, metadata: Mapping[str, Value]):
        self._metadata = metadata
        outline = gguf_tokenizer.outline(metadata)
        steps, self._tokens, types = outline.spec, outline.tokens, outline.types
        self._special = np.isin(types, gguf_tokenizer.SPECIALS)
        kinds = PIECE * np.isin(types, (NORMAL, UNUSED)) | ADDED * np.isin(types, gguf_tokenizer.ADDED)
        data, starts = _packed(self._tokens)
        merges = _packed(outline.merges) if outline.merges is not None else None
        model = steps["model"]
        unknown = -1 if model["unk_token"] is None else outline.unknown
        try:
            self._native = _native.Bpe(
                data=data, starts=starts, kinds=kinds.astype(np.uint8), merge_data=merges and merges[0],
                merge_starts=merges and merges[1], scores=outline.scores, byte_fallback=model["byte_fallback"],
                whole_words=model["ignore_merges"], unknown=unknown)
        except ValueError as error:
            raise FewbitsError(f"{KEY}{error}") from None
        if self._native.repeated >= 0:
            raise FewbitsError(f"{KEY}tokens holds {self._tokens[self._native.repeated]!r} twice")
        frame = {**steps, "added_tokens": [], "post_processor": None, "model": {**model, "unk_token": None}}
        self._frame = tokenizers.Tokenizer.from_str(json.dumps(frame))
        self._normalizer, self._splitter = self._frame.normalizer, self._frame.pre_tokenizer
        self._before, self._after = _around(steps["post_processor"])

    def encode(self, text: str, special: bool) -> list[int]:
        found = list(self._before) if special else []
        for token, part in self._native.split(text):
            if token >= 0:
                found.append(token)
                continue
            if self._normalizer is not None:
                part = self._normalizer.normalize_str(part)
            words = [part] if self._splitter is None else [w for w, _ in self._splitter.pre_tokenize_str(part)]
            found += self._native.encode(words)
        return found + self._after if special else found

    def decode(self, tokens: Sequence[int]) -> str:
        texts = [self._tokens[t] for t in tokens if 0 <= t < len(self._tokens) and not self._special[t]]
        return str(self._frame.decoder.decode(texts))

    def id(self, token: str) -> int | None:
        found = self._native.find(token)
        return found if found >= 0 else None

    def name(self, token: int) -> str:
        return self._tokens[token] if 0 <= token < len(self._tokens) else ""

    def special(self) -> dict[str, int]:
        return {self._tokens[i]: i for i in np.flatnonzero(self._special).tolist()}

    def size(self) -> int:
        return len(self._tokens)

    def names(self) -> Iterable[str]:
        return self._tokens

    @cached_property
    def _library(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_buffer(gguf_tokenizer.tokenizer_json(self._metadata))

    def library(self) -> tokenizers.Tokenizer:
        return self._library


def _packed(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of texts and where each starts, 8 bytes between; those of a file are not copied."""
    if isinstance(texts, Strings):
        return np.frombuffer(texts.buffer, np.uint8), texts.starts
    raw = [t.encode() for t in texts]
    starts = np.cumsum([0, *(len(r) + 8 for r in raw)], dtype=np.int64)
    return np.frombuffer(b"".join(r + bytes(8) for r in raw) or bytes(1), np.uint8), starts


def _around(post: Json | None) -> tuple[list[int], list[int]]:
    """Tokens before and after every text."""
    if post is None:
        return [], []
    ids: list[Any] = [post["special_tokens"][part["SpecialToken"]["id"]]["ids"][0] if "SpecialToken" in part else None
           for part in post["single"]]
    at = ids.index(None)
    return ids[:at], ids[at + 1:]


def same(one: Core, other: Core) -> bool:
    """Whether two write the same tokens with the same ids."""
    return one.size() == other.size() and all(map(eq, one.names(), other.names()))
