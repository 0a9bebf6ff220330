"""Answers held to a form: whatever the logits say, what comes out is in it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from fewbits import containers
from fewbits.errors import FewbitsError
from fewbits.text.grammar import Grammar
from fewbits.text.sampling import Sampler, Sampling
from fewbits.text.tokenizer import Tokenizer, tokenizer

SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"},
                                           "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}},
          "required": ["name", "age", "tags"], "additionalProperties": False}


@pytest.fixture(scope="module")
def words(tiny) -> Tokenizer:
    return tokenizer(containers.open(tiny))


def drawn(grammar: Grammar, words: Tokenizer, seed: int, vocabulary: int, most: int = 400) -> str:
    """An answer of random logits."""
    rng, matcher, tokens = np.random.default_rng(seed), grammar.begin(), list[int]()
    sampler = Sampler(Sampling(1.0, seed=seed), vocabulary)
    for _ in range(most):
        token = sampler.pick(rng.normal(0, 3, vocabulary).astype(np.float32), tokens, matcher.allowed())
        if token in words.ends:
            break
        assert matcher.fits(token)
        matcher.accept(token)
        tokens.append(token)
        if matcher.complete:
            break
    else:
        raise AssertionError("no end")
    return words.decode(tokens)


def test_json_schema(words: Tokenizer) -> None:
    grammar = Grammar("json-schema", SCHEMA, words, words.size + 5)  # logits that no token has
    for seed in range(8):
        found = json.loads(drawn(grammar, words, seed, words.size + 5))
        assert list(found) == ["name", "age", "tags"] and len(found["name"]) <= 6 and type(found["age"]) is int
        assert len(found["tags"]) <= 2 and set(found["tags"]) <= {"a", "b"}


def test_regex_and_grammars(words: Tokenizer) -> None:
    for kind, source, form in (("regex", "[0-9]{2,4}(th|é)", "[0-9]{2,4}(th|é)"),
                               ("lark", 'start: ("in" | "er")+ "!"', "(in|er)+!"),
                               ("gbnf", 'root ::= "x" word*\nword ::= [a-c] "-"', "x([a-c]-)*")):
        grammar = Grammar(kind, source, words, words.size)
        for seed in range(4):
            assert re.fullmatch(form, drawn(grammar, words, seed, words.size))


@pytest.mark.parametrize("kind,source,message", [
    ("json-schema", "{", "json-schema: Expecting"), ("json-schema", '{"type": "objct"}', "json-schema: .*objct"),
    ("json-schema", '{"$ref": "http://example.org/x"}', "json-schema: "), ("json-schema", "[1]", "json-schema: "),
    ("regex", "[0-9", "regex: .*unclosed"), ("lark", "start: foo", 'lark: .*unknown name: "foo"'),
    ("gbnf", "root ::= foo", "gbnf: .*foo"), ("yacc", "x", "unknown kind of grammar 'yacc'"),
    ("json-schema", "[" * 100_000, "json-schema: ")])
def test_wrong_grammars(kind: str, source: str, message: str, words: Tokenizer) -> None:
    with pytest.raises(FewbitsError, match=message) as error:
        Grammar(kind, source, words, words.size)
    assert "\n" not in str(error.value)


def test_a_token_that_is_not_allowed(words: Tokenizer) -> None:
    matcher = Grammar("regex", "a", words, words.size).begin()
    allowed = matcher.allowed()
    assert [matcher.fits(i) for i in range(words.size)] == allowed.tolist() and allowed.sum() == 1
    assert not any(matcher.fits(end) for end in words.ends)
    with pytest.raises(FewbitsError, match="grammar: "):
        matcher.accept(words.encode("b", special=False)[0])
