"""Tokenizers there and back: the same tokens for any text, against a SentencePiece written out plainly."""

from __future__ import annotations

import json
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fewbits.containers import gguf_tokenizer as gt
from fewbits.containers import sentencepiece
from fewbits.containers.gguf_file import Value
from fewbits.containers.gguf_pretokenizer import WORDS
from fewbits.errors import FewbitsError

CORPUS = ["The quick brown fox can't jump over 12 lazy dogs, they'll see 3456.", "Les élèves étaient là — voilà!",
          "def f(x):\n    return x ** 2\n\n\n", "Всё хорошо 🙂🙂", "こんにちは世界"] * 3
TEXTS = st.text(st.one_of(st.sampled_from(" \n\t'sltredoxfj,.!123é—В🙂世 ▁<>"), st.characters(codec="utf-8")),
                max_size=40)
# as openai/tiktoken and mistralai/Mistral-Nemo spell them
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
          r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PRE = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), None, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), None, False),
    "llama-bpe": (pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS % "{1,3}"), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False)]), None, True),
    "qwen2": (pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS % ""), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False)]), normalizers.NFC(), False),
    "olmo": (pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC(), False),
    "dbrx": (pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS % "{1,3}"), "removed", invert=True),  # how converters from tiktoken write it
        pre_tokenizers.ByteLevel(False, use_regex=False)]), None, False),
    "gpt-4o": (pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(O200K), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False)]), None, False),
    "tekken": (pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(TEKKEN), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False)]), None, True),
}


def byte_level(name: str) -> Tokenizer:
    """A small byte-level BPE as `tokenizers` trains it."""
    pre, normalizer, ignore_merges = PRE[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def files_of(tokenizer: Tokenizer, **config) -> dict[str, bytes]:
    return {"tokenizer.json": tokenizer.to_str().encode(),
            "tokenizer_config.json": json.dumps({"bos_token": "<s>", "eos_token": "</s>"} | config).encode()}


@pytest.fixture(scope="module", params=PRE)
def pair(request):
    """A byte-level tokenizer, its metadata, and what comes back of it."""
    before = byte_level(request.param)
    metadata = gt.to_metadata(files_of(before), {}, before.get_vocab_size())
    return request.param, before, metadata, Tokenizer.from_str(gt.tokenizer_json(metadata).decode())


def test_the_pre_tokenizer_is_recognised(pair):
    name, before, metadata, _ = pair
    assert metadata["tokenizer.ggml.pre"].value == name
    types = metadata["tokenizer.ggml.token_type"].value
    assert [types[before.token_to_id(t)] for t in ("<s>", "</s>", "<tool>", "a")] == [3, 3, 4, 1]
    assert metadata["tokenizer.ggml.add_bos_token"] == Value("BOOL", True)
    assert metadata["tokenizer.ggml.eos_token_id"] == Value("UINT32", 1)


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_byte_level_tokens_are_equal(pair, text):
    _, before, _, after = pair
    assert after.encode(text + "<tool>x</s>").ids == before.encode(text + "<tool>x</s>").ids
    assert after.decode(after.encode(text).ids) == before.decode(before.encode(text).ids)


def test_spaces_behind_the_added_tokens_of_phi_3():
    """llama.cpp swallows them in files of that name: written where tokenizer.json says so too, refused elsewhere."""
    tokenizer = byte_level("gpt-2")
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:
        token["rstrip"] = token["content"] not in gt.NOT_STRIPPING
    files = {"tokenizer.json": json.dumps(spec).encode(), "tokenizer_config.json": b'{"bos_token": "<s>"}'}
    metadata = gt.to_metadata(files, {}, 400, "Phi-3-mini")
    back = json.loads(gt.tokenizer_json(metadata | {"general.name": Value("STRING", "Phi-3-mini")}))
    assert [t["rstrip"] for t in back["added_tokens"]] == [t["content"] != "<s>" for t in back["added_tokens"]]
    for name, other in (("tiny", files), ("phi3", files_of(tokenizer))):
        with pytest.raises(FewbitsError, match="strips its surroundings"):
            gt.to_metadata(other, {}, 400, name)


# SentencePiece ------------------------------------------------------------------------------------------------------
def _pieces(seed: int) -> tuple[list[str], list[int], np.ndarray]:
    """A vocabulary as SentencePiece trains it: pieces made of two earlier ones, later means rarer."""
    rng = random.Random(seed)
    letters = ["▁", *"abcde", "é"]
    made: list[str] = []
    while len(made) < 60:
        known = letters + made
        piece = rng.choice(known) + rng.choice(known)
        if piece not in made and len(piece) < 9:
            made.append(piece)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *made, *letters, "<x>", "\n\n"]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(made) + len(letters)), 3, 4]
    scores = np.array([0.0] * 259 + [-float(i) for i in range(len(made) + len(letters))] + [-1000.0] * 2, np.float32)
    return tokens, types, scores


def _metadata(tokens, types, scores, **more) -> dict[str, Value]:
    return {"tokenizer.ggml.model": Value("STRING", "llama"), "tokenizer.ggml.pre": Value("STRING", "default"),
            "tokenizer.ggml.tokens": Value("ARRAY", tokens, "STRING"),
            "tokenizer.ggml.scores": Value("ARRAY", scores, "FLOAT32"),
            "tokenizer.ggml.token_type": Value("ARRAY", np.array(types, np.int32), "INT32"),
            "tokenizer.ggml.bos_token_id": Value("UINT32", 1), "tokenizer.ggml.eos_token_id": Value("UINT32", 2),
            "tokenizer.ggml.unknown_token_id": Value("UINT32", 0),
            **{f"tokenizer.ggml.{k}": Value("BOOL", v) for k, v in more.items()}}


def plain_sentencepiece(text: str, tokens: list[str], scores: np.ndarray) -> list[int]:
    """Join the neighbours whose piece scores highest, the leftmost of equals, until none does; bytes for the rest."""
    ids = {t: i for i, t in enumerate(tokens)}
    parts = list(text.replace(" ", "▁"))
    while True:
        pairs = enumerate(zip(parts, parts[1:], strict=False))
        joins = [(-scores[ids[a + b]], i) for i, (a, b) in pairs if a + b in ids]
        if not joins:
            break
        _, at = min(joins)
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return [i for p in parts for i in ([ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode()])]


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 5), text=st.text(st.sampled_from(" abcdeéz🙂"), max_size=30), prefix=st.booleans())
def test_sentencepiece_tokens_are_those_of_the_plain_algorithm(seed, text, prefix):
    tokens, types, scores = _pieces(seed)
    metadata = _metadata(tokens, types, scores, add_space_prefix=prefix, add_bos_token=True)
    tokenizer = Tokenizer.from_str(gt.tokenizer_json(metadata).decode())
    wanted = plain_sentencepiece((" " if prefix else "") + text, tokens, scores) if text else []
    assert tokenizer.encode(text).ids == [1, *wanted]
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("a\n\nb<x>").tokens.count("\n\n") == 1


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_sentencepiece_metadata_comes_back(seed, prefix):
    tokens, types, scores = _pieces(seed)
    metadata = _metadata(tokens, types, scores, add_space_prefix=prefix, add_bos_token=True, add_eos_token=False)
    files = {"tokenizer.json": gt.tokenizer_json(metadata), "tokenizer_config.json": gt.tokenizer_config(metadata)}
    back = gt.to_metadata(files, {}, len(tokens))
    assert back.keys() == metadata.keys()
    for key in metadata.keys() - {"tokenizer.ggml.scores", "tokenizer.ggml.token_type"}:
        assert back[key] == metadata[key], key
    # <unk> is a special token of tokenizer.json like any other
    assert back["tokenizer.ggml.token_type"].value.tolist() == [3, *types[1:]]
    made = slice(259, 259 + 60)
    assert np.array_equal(np.argsort(-back["tokenizer.ggml.scores"].value[made], kind="stable"), np.arange(60))


@pytest.mark.parametrize("normalizer, pre, prefix", [
    (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, True),
    (normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), False),
    (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True),
    (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), False),
])
def test_every_way_to_say_spaces(normalizer, pre, prefix):
    spec = json.loads(gt.tokenizer_json(_metadata(*_pieces(0))))
    tokenizer = Tokenizer.from_str(json.dumps(spec | {"normalizer": None, "pre_tokenizer": None}))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    back = gt.to_metadata(files_of(tokenizer), {}, 400)
    assert back["tokenizer.ggml.add_space_prefix"] == Value("BOOL", prefix)


# vocabulary and embedding, templates --------------------------------------------------------------------------------
def test_a_wider_embedding_is_filled_up_and_a_narrower_one_cut():
    tokenizer = byte_level("gpt-2")
    size = tokenizer.get_vocab_size()
    wide = gt.to_metadata(files_of(tokenizer), {}, size + 2)
    assert wide["tokenizer.ggml.tokens"].value[-2:] == [f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert wide["tokenizer.ggml.token_type"].value.tolist()[-3:] == [4, 5, 5]
    assert len(gt.to_metadata(files_of(tokenizer), {}, size - 1)["tokenizer.ggml.tokens"].value) == size - 1


@pytest.mark.parametrize("template", ["{{ messages }}", [{"name": "default", "template": "a"},
                                                         {"name": "tool_use", "template": "b"}]])
def test_chat_templates_come_back(template):
    metadata = gt.to_metadata(files_of(byte_level("gpt-2"), chat_template=template), {}, 400)
    assert json.loads(gt.tokenizer_config(metadata))["chat_template"] == template


def test_a_template_in_its_own_file_counts():
    files = files_of(byte_level("gpt-2")) | {"chat_template.jinja": b"{{ x }}"}
    assert gt.to_metadata(files, {}, 400)["tokenizer.chat_template"].value == "{{ x }}"


def test_without_a_tokenizer_the_file_says_so():
    assert gt.to_metadata({}, {}, 10) == {"tokenizer.ggml.model": Value("STRING", "no_vocab")}


# refusals -----------------------------------------------------------------------------------------------------------
def _changed(**changes) -> dict[str, bytes]:
    spec = json.loads(byte_level("gpt-2").to_str())
    for key, value in changes.items():
        (spec["model"] if key in spec["model"] else spec)[key] = value
    return files_of(Tokenizer.from_str(json.dumps(spec))) | {"tokenizer.json": json.dumps(spec).encode()}


@pytest.mark.parametrize("changes, message", [
    ({"pre_tokenizer": {"type": "Whitespace"}}, 'no name known here for the pre-tokenizer {"type": "Whitespace"}'),
    ({"normalizer": {"type": "Lowercase"}}, "normalizer {'type': 'Lowercase'}"),
    ({"added_tokens": [{"id": 0, "content": "<m>", "single_word": False, "lstrip": True, "rstrip": False,
                        "normalized": False, "special": True}]}, "'<m>' strips its surroundings"),
    ({"dropout": 0.1}, "dropout"),
    ({"byte_fallback": True}, "GGUF cannot say normalizer"),
])
def test_what_gguf_cannot_say_is_refused(changes, message):
    with pytest.raises(FewbitsError, match=message):
        gt.to_metadata(_changed(**changes), {}, 400)


def test_other_models_and_older_files_are_refused():
    spec = json.loads(byte_level("gpt-2").to_str()) | {"model": {"type": "Unigram", "vocab": []}}
    with pytest.raises(FewbitsError, match="Unigram"):
        gt.to_metadata({"tokenizer.json": json.dumps(spec).encode()}, {}, 400)
    with pytest.raises(FewbitsError, match="tokenizer.json is missing"):
        gt.to_metadata({"tokenizer.model": b""}, {}, 400)


@pytest.mark.parametrize("merges, message", [
    ([["a", "b"], ["b", "c"], ["ab", "c"]], "never make the token 'abc' of 'a' and 'bc'"),
    ([["a", "b"], ["b", "c"], ["ab", "c"], ["c", "c"], ["a", "bc"]], "'abc' do not stand together"),
])
def test_merges_that_no_scores_say_are_refused(merges, message):
    tokens = ["a", "b", "c", "ab", "bc", "abc"]
    with pytest.raises(FewbitsError, match=message):
        gt.scores_from_merges(merges, tokens, [1] * len(tokens))


@pytest.mark.parametrize("change, message", [
    ({"tokenizer.ggml.model": Value("STRING", "t5")}, "model is 't5'"),
    ({"tokenizer.ggml.pre": Value("STRING", "odd-bpe")}, "pre is 'odd-bpe'"),
    ({"tokenizer.ggml.merges": Value("ARRAY", ["ab"], "STRING")}, r"merges\[0\] is 'ab'"),
    ({"tokenizer.ggml.tokens": Value("ARRAY", ["a", "b", "a"], "STRING")}, "'a' twice"),
    ({"tokenizer.ggml.token_type": Value("ARRAY", np.array([1], np.int32), "INT32")}, "token_type has 1 entries"),
    ({"tokenizer.ggml.bos_token_id": Value("UINT32", 10**6)}, "bos_token_id is 1000000"),
    ({"tokenizer.ggml.bos_token_id": Value("STRING", "a")}, "bos_token_id is of type STRING"),
    ({"tokenizer.ggml.merges": Value("ARRAY", np.array([1], np.int32), "INT32")}, "merges is of type ARRAY INT32"),
])
def test_metadata_that_make_no_tokenizer_are_refused(change, message):
    metadata = {"tokenizer.ggml.model": Value("STRING", "gpt2"), "tokenizer.ggml.pre": Value("STRING", "gpt-2"),
                "tokenizer.ggml.tokens": Value("ARRAY", ["a", "b", "ab"], "STRING"),
                "tokenizer.ggml.merges": Value("ARRAY", ["a b"], "STRING"),
                "tokenizer.ggml.add_bos_token": Value("BOOL", True)}
    with pytest.raises(FewbitsError, match=message):
        gt.tokenizer_json(metadata | change)


# tokenizer.model ----------------------------------------------------------------------------------------------------
def _proto(pieces: dict[str, float], model_type: int = 2) -> bytes:
    def field(number: int, raw: bytes) -> bytes:
        return bytes([number << 3 | 2, len(raw)]) + raw

    out = b"".join(field(1, field(1, p.encode()) + b"\x15" + struct.pack("<f", s)) for p, s in pieces.items())
    return out + field(2, b"\x18" + bytes([model_type]))


def test_scores_of_a_sentencepiece_model():
    assert sentencepiece.scores(_proto({"▁a": -1.5, "é": 0.0})) == {"▁a": -1.5, "é": 0.0}


@pytest.mark.parametrize("raw, message", [
    (_proto({"a": 0.0}, 1), "not a BPE model"), (b"\x0a\xff", "not a SentencePiece"),
    (b"\x0f", "not a SentencePiece"), (_proto({"a": 1.0})[:-5], "not a SentencePiece")])
def test_other_files_are_refused(raw, message):
    with pytest.raises(FewbitsError, match=message):
        sentencepiece.scores(raw)
