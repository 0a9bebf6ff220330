"""Tokens over a mapped vocabulary are those of tokenizer.json, for every pre-tokenizer, whatever the text."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tokenizers

from fewbits import _native, containers
from fewbits.containers import gguf_tokenizer as gt
from fewbits.containers.gguf import Gguf
from fewbits.containers.gguf_file import Value
from fewbits.containers.gguf_pretokenizer import PRE
from fewbits.errors import FewbitsError
from fewbits.text.core import Library, Mapped, same
from fewbits.text.tokenizer import tokenizer
from tests.containers.test_gguf_tokenizer import byte_level, files_of

PLAIN = ["", " ", "Hello world", "  two  spaces\n\n\ttab ", "camelCase HTTPServer's don'T 1234567 12 1", "a/b//\n/c",
         "naïve €uro 🙂 日本語 e\u0301", "<s>x</s> y", "<tool><tool>x<tool", "<<tool>>",
         "a\u00a0b\u3000c\0d", "x" * 300,
         "the the " * 40, "\u2581x \u2581"]


def texts(count: int = 120) -> list[str]:
    rng = random.Random(0)
    sets = ["abcdefgh", "ABCdefGH", "  \n\t", "\r\n", "0123456789", ".,!?'\"-_<>[]/", "éüñçßøåÉÜ", "приветМИР",
            "你好世界", "🙂🎉👍", "'s't'll'RE", "thiner" * 3, "\u00a0\u3000\u0301"]
    return PLAIN + ["".join(rng.choice(rng.choice(sets)) for _ in range(rng.randint(1, 90))) for _ in range(count)]


def equal(metadata: dict[str, Value]) -> None:
    ours, theirs = Mapped(metadata), Library(tokenizers.Tokenizer.from_buffer(gt.tokenizer_json(metadata)))
    for text in texts():
        for special in (True, False):
            assert ours.encode(text, special) == theirs.encode(text, special), text
        tokens = ours.encode(text, True)
        for at in range(0, len(tokens), 7):
            assert ours.decode(tokens[at:]) == theirs.decode(tokens[at:])
    assert same(ours, theirs) and ours.special() == theirs.special() and ours.size() == theirs.size()
    assert all(ours.id(ours.name(i)) == i for i in range(0, ours.size(), 1 + ours.size() // 999))
    assert ours.id("no such token") is None
    assert (ours.name(-1), ours.name(ours.size())) == ("", "")


def strings(values: list[str]) -> Value:
    return Value("ARRAY", values, "STRING")


@pytest.mark.parametrize("name", PRE)
def test_every_pretokenizer(name: str) -> None:
    files = files_of(byte_level("gpt-2"))
    rows = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"]).get_vocab_size() + 3
    equal(gt.to_metadata(files, {}, rows) | {"tokenizer.ggml.pre": Value("STRING", name)})


def test_a_file_of_scores(shared, tmp_path) -> None:
    """SentencePiece: bytes for what has no token, a space before a text; mapped from a file."""
    source = containers.open(shared("models/stories260k"))
    back = containers.write(Gguf(), tmp_path / "m.gguf", source)
    equal(back.facts["metadata"])
    ours, theirs = tokenizer(back), tokenizer(source)
    assert isinstance(ours.core, Mapped) and all(
        ours.encode(text) == theirs.encode(text) for text in PLAIN if "\u2581" not in text)


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct.Q4_1.gguf",
                                  pytest.param("gemma-3-270m.Q4_K_M.gguf", marks=pytest.mark.slow)])
def test_files_of_others(name: str, model) -> None:
    equal(containers.open(model(name)).facts["metadata"])


def scored(seed: int, prefix: bool, unknown: bool) -> dict[str, Value]:
    """Random pieces of few letters, many of equal score, bytes only for some."""
    rng = random.Random(seed)
    words = {"".join(rng.choice("ab▁é") for _ in range(rng.randint(2, 5))) for _ in range(60)}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256) if not unknown or i % 2),
              *"ab▁é", *sorted(words), "<tool>", "<tool><"]
    kinds = [gt.UNKNOWN, gt.CONTROL, gt.CONTROL, *[gt.BYTE] * (256 if not unknown else 128),
             *[rng.choice([gt.NORMAL] * 9 + [gt.UNUSED, gt.USER_DEFINED]) for _ in range(4 + len(words))],
             gt.USER_DEFINED, gt.USER_DEFINED]
    scores = [float(-rng.randint(0, 9)) for _ in tokens]
    return {"tokenizer.ggml.model": Value("STRING", "llama"), "tokenizer.ggml.tokens": strings(tokens),
            "tokenizer.ggml.token_type": Value("ARRAY", np.array(kinds, np.int32), "INT32"),
            "tokenizer.ggml.scores": Value("ARRAY", np.array(scores, np.float32), "FLOAT32"),
            "tokenizer.ggml.add_space_prefix": Value("BOOL", prefix),
            "tokenizer.ggml.add_eos_token": Value("BOOL", not prefix)}


@pytest.mark.parametrize("seed", range(6))
def test_random_pieces(seed: int) -> None:
    metadata = scored(seed, bool(seed % 2), seed > 3)
    equal(metadata)
    rng = random.Random(seed)
    ours, theirs = Mapped(metadata), tokenizers.Tokenizer.from_buffer(gt.tokenizer_json(metadata))
    for _ in range(300):
        text = "".join(rng.choice("ab éx") for _ in range(rng.randint(1, 40)))
        assert ours.encode(text, True) == theirs.encode(text).ids


@pytest.mark.parametrize("seed", range(4))
def test_random_merges(seed: int) -> None:
    """Merges in any order, listed twice, of letters that are missing, whole words first."""
    rng = random.Random(seed)
    tokens, merges = ["<s>", *"abcĠ"], []
    while len(tokens) < 60:
        pair = rng.choice(tokens[1:]), rng.choice(tokens[1:])
        merges.append(" ".join(pair))
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
    rng.shuffle(merges)
    metadata = {"tokenizer.ggml.model": Value("STRING", "gpt2"),
                "tokenizer.ggml.pre": Value("STRING", rng.choice(["gpt-2", "llama-bpe", "tekken"])),
                "tokenizer.ggml.tokens": strings(tokens + sorted({"Ġbca", "aaaa"} - set(tokens))),
                "tokenizer.ggml.merges": strings(merges)}
    ours, theirs = Mapped(metadata), tokenizers.Tokenizer.from_buffer(gt.tokenizer_json(metadata))
    for _ in range(300):
        text = "".join(rng.choice("abc x") for _ in range(rng.randint(1, 40)))
        assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False).ids, text


def test_long_words_take_no_longer_than_short_ones() -> None:
    """A word of 400 000 letters: quadratic work would take minutes."""
    ours = Mapped(scored(0, True, False))
    text = "ab" * 200_000
    assert len(ours.decode(ours.encode(text, False))) == len(text)


@pytest.mark.parametrize("change,message", [
    ({"tokenizer.ggml.tokens": strings(["a", "b", "a"])}, "holds 'a' twice"),
    ({"tokenizer.ggml.pre": Value("STRING", "weird")}, "pre is 'weird'"),
    ({"tokenizer.ggml.model": Value("STRING", "bert")}, "model is 'bert'")])
def test_wrong_metadata(change: dict, message: str) -> None:
    metadata = {"tokenizer.ggml.model": Value("STRING", "gpt2"), "tokenizer.ggml.pre": Value("STRING", "gpt-2"),
                "tokenizer.ggml.tokens": strings(["a", "b", "ab"]), "tokenizer.ggml.merges": strings(["a b"])}
    assert Mapped(metadata).encode("abab", False) == [2, 2]
    with pytest.raises(FewbitsError, match=message):
        Mapped(metadata | change)


def test_native_checks() -> None:
    right = {"data": np.zeros(30, np.uint8), "starts": np.array([0, 9, 18]), "kinds": np.zeros(2, np.uint8),
             "merge_data": None, "merge_starts": None, "scores": np.zeros(2, np.float32), "byte_fallback": False,
             "whole_words": False, "unknown": -1}
    _native.Bpe(**right)
    for change in ({"starts": np.array([0, 9, 99])}, {"starts": np.array([-1, 9, 18])},
                   {"starts": np.array([0, 7, 18])}, {"kinds": np.zeros(3, np.uint8)},
                   {"scores": np.zeros(1, np.float32)}, {"scores": None},
                   {"unknown": 2}, {"starts": np.zeros(0, np.int64)}, {"merge_data": np.zeros(9, np.uint8)}):
        with pytest.raises(ValueError):
            _native.Bpe(**(right | change))
