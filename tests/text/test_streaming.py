"""Pieces of streams: whole characters, together what all tokens decode to; stop strings wherever they fall."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits import containers
from fewbits.text.streaming import Stream
from fewbits.text.tokenizer import Tokenizer, tokenizer


@pytest.fixture(scope="module")
def byte_level(tiny) -> Tokenizer:
    """A token a byte."""
    return tokenizer(containers.open(tiny))


@pytest.fixture(scope="module")
def sentencepiece(shared) -> Tokenizer:
    """Bytes where there are no letters, and a space before the text."""
    return tokenizer(containers.open(shared("models/stories260k")))


def pieces(tokens: list[int], by: Tokenizer, stops: tuple[str, ...] = ()) -> tuple[list[str], Stream]:
    stream, found = Stream(by, stops), []
    for token in tokens:
        found.append(stream.push(token))
        if stream.stopped is not None:
            break
    found.append(stream.flush())
    assert "".join(found) == stream.text
    return found, stream


@given(text=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_pieces_make_the_text(text: str, byte_level: Tokenizer) -> None:
    tokens = byte_level.encode(text, special=False)
    found, stream = pieces(tokens, byte_level)
    assert stream.text == text == byte_level.decode(tokens)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


@pytest.mark.parametrize("text", ["Once upon a time", "  two  spaces ", "naïve €uro 🙂🙂 日本", "Lily\n\nTom", " "])
def test_pieces_of_sentencepiece(text: str, sentencepiece: Tokenizer) -> None:
    tokens = sentencepiece.encode(text, special=False)
    found, stream = pieces(tokens, sentencepiece)
    assert stream.text == sentencepiece.decode(tokens)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


def test_a_character_comes_whole(byte_level: Tokenizer) -> None:
    found, _ = pieces(byte_level.encode("a🙂b", special=False), byte_level)
    assert found == ["a", "", "", "", "🙂", "b", ""]


def test_broken_bytes_are_said_at_last(byte_level: Tokenizer) -> None:
    lead = byte_level.encode("🙂", special=False)[0]
    found, stream = pieces([lead] * 40, byte_level)
    assert stream.text == byte_level.decode([lead] * 40) and sum(map(bool, found)) > 1
    found, stream = pieces([*byte_level.encode("x", special=False), lead], byte_level)
    assert stream.text == "x\N{REPLACEMENT CHARACTER}" and found[:2] == ["x", ""]


@given(text=st.text("abé", max_size=30), stops=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
@settings(max_examples=150, deadline=None)
def test_text_ends_where_a_stop_string_is_first_complete(text: str, stops: list[str], byte_level: Tokenizer) -> None:
    _, stream = pieces(byte_level.encode(text, special=False), byte_level, tuple(stops))
    for end in range(len(text) + 1):
        here = [(text[:end].index(stop), stop) for stop in stops if stop in text[:end]]
        if here:
            at, stop = min(here)
            assert (stream.text, stream.stopped) == (text[:at], stop)
            return
    assert (stream.text, stream.stopped) == (text, None)


def test_the_beginning_of_a_stop_string_waits(byte_level: Tokenizer) -> None:
    found, stream = pieces(byte_level.encode("xENx", special=False), byte_level, ("END",))
    assert found == ["x", "", "", "ENx", ""] and stream.stopped is None
    found, stream = pieces(byte_level.encode("xEN", special=False), byte_level, ("END",))
    assert found == ["x", "", "", "EN"]


def test_special_tokens_have_no_text(byte_level: Tokenizer) -> None:
    x = byte_level.encode("x", special=False)
    _, stream = pieces([1, *x, 2, 2, *x], byte_level)
    assert stream.text == "xx"
