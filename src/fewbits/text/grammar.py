"""Answers of a form: a JSON schema, a regular expression, a Lark or GBNF grammar. llguidance computes the masks."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import numpy as np

from fewbits.errors import FewbitsError
from fewbits.text.tokenizer import Tokenizer

GRAMMARS = ("json-schema", "regex", "lark", "gbnf")


class Grammar:
    """A form, compiled for one tokenizer; `begin()` starts an answer in it."""

    def __init__(self, kind: str, source: str | dict[str, Any], tokenizer: Tokenizer, vocabulary: int):
        """Compile a grammar for a model of `vocabulary` logits.

        Raises:
            FewbitsError: it is none of its kind; the message says where.
        """
        import llguidance

        if kind not in GRAMMARS:
            raise FewbitsError(f"unknown kind of grammar {kind!r}", "one of: " + ", ".join(GRAMMARS))
        self.vocabulary, self._ends = vocabulary, sorted(tokenizer.ends)
        if not self._ends:
            raise FewbitsError("the model has no token that ends an answer: a grammar could not end either")
        try:
            self._grammar = _grammar(kind, source)
            self._tokenizer = _for_llguidance(tokenizer, vocabulary)
        except Exception as error:  # the converter from GBNF raises nothing more particular
            raise FewbitsError(f"{kind}: {_line(error)}") from None
        wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(self._grammar, self._tokenizer)
        if wrong:
            raise FewbitsError(f"{kind}: {_line(messages[0])}")

    def begin(self) -> Matcher:
        return Matcher(self)


class Matcher:
    """How far an answer has come in its grammar."""

    def __init__(self, grammar: Grammar):
        import llguidance

        self._grammar = grammar
        self._native = llguidance.LLMatcher(grammar._tokenizer, grammar._grammar, log_level=0)
        self._bits = np.zeros((grammar.vocabulary + 31) // 32, np.int32)
        self._check()

    def allowed(self) -> np.ndarray:
        """Which tokens may follow, booleans `[vocabulary]`.

        Raises:
            FewbitsError: the grammar takes too much to go on.
        """
        self._native.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        return np.unpackbits(self._bits.view(np.uint8), count=self._grammar.vocabulary, bitorder="little").view(bool)

    def fits(self, token: int) -> bool:
        """Whether a token is allowed: much less work than which ones are."""
        return bool(self._native.validate_tokens([token]) == 1)

    def accept(self, token: int) -> None:
        """Go on by a token that was allowed.

        Raises:
            FewbitsError: it was not.
        """
        self._native.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Nothing may follow but the end."""
        return bool(self._native.is_stopped())

    def _check(self) -> None:
        if self._native.is_error():
            raise FewbitsError(f"grammar: {_line(self._native.get_error())}")


def _grammar(kind: str, source: str | dict[str, Any]) -> str:
    import llguidance

    if kind == "json-schema":
        if isinstance(source, str):
            source = json.loads(source)
        return str(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(source)))
    assert isinstance(source, str)
    if kind == "regex":
        return str(llguidance.LLMatcher.grammar_from_regex(source))
    if kind == "gbnf":
        from llguidance.gbnf_to_lark import any_to_lark

        source = any_to_lark(source)
    return str(llguidance.LLMatcher.grammar_from_lark(source))


@lru_cache(maxsize=2)  # takes a quarter of a second for 49 152 tokens
def _for_llguidance(tokenizer: Tokenizer, vocabulary: int) -> Any:
    import llguidance

    ends = [i for i in tokenizer.ends if i < vocabulary]
    return llguidance.LLTokenizer(tokenizer.core.library().to_str(), n_vocab=vocabulary, eos_token=ends)


def _line(error: object) -> str:
    return " ".join(str(error).split())[:400]
