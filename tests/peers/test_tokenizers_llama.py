"""Every pre-tokenizer in the table: llama.cpp cuts texts of our file as the tokenizer.json that it came from does."""

from __future__ import annotations

import json
import random
import subprocess
import unicodedata

import pytest
import transformers
from tokenizers import Tokenizer

from fewbits import containers
from fewbits.containers.gguf import Gguf
from tests.arch.models import directory, tiny
from tests.containers.test_gguf_tokenizer import PRE, byte_level, files_of

pytestmark = pytest.mark.peer
TOKENS = """
import json, sys
from llama_cpp import Llama
llama = Llama(sys.argv[1], vocab_only=True, verbose=False)
print(json.dumps([llama.tokenize(t.encode(), add_bos=True, special=True) for t in json.load(sys.stdin)]))
"""
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def _texts() -> list[str]:
    """Letters of many scripts, digits, signs and white space; composed, for llama.cpp normalizes nothing."""
    rng = random.Random(0)
    sets = ["abcdefgh", "ABCdefGH", "  \n\t", "\r\n", "0123456789", ".,!?'\"-_<>[]/", "éüñçßøåÉÜ", "приветМИР",
            "你好世界", "こんにちは", "مرحبا", "🙂🎉👍", "'s't'll'RE", "\u00a0\u3000"]
    words = ["".join(rng.choice(rng.choice(sets)) for _ in range(rng.randint(1, 120))) for _ in range(150)]
    plain = ["", " ", "Hello world", "  two  spaces", "camelCase HTTPServer's don'T", "a/b//\n/c", "1234567 12 1",
             "<s>x</s> y", "x<tool>  y"]
    return [unicodedata.normalize("NFC", t) for t in plain + words]


def _theirs(python: str, path, texts: list[str]) -> list[list[int]]:
    done = subprocess.run([python, "-c", TOKENS, str(path)], input=json.dumps(texts), text=True, check=True,
                          capture_output=True)
    found: list[list[int]] = json.loads(done.stdout)
    return found


def _written(folder, tokenizer: Tokenizer, files: dict[str, bytes]):
    config = transformers.LlamaConfig(**SMALL, vocab_size=tokenizer.get_vocab_size())
    directory(tiny(config), folder)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return containers.write(Gguf(), folder.with_suffix(".gguf"), containers.open(folder))


@pytest.mark.parametrize("name", PRE)
def test_tokens_are_those_of_tokenizer_json(name, tmp_path, peer):
    python, tokenizer, texts = peer("llama"), byte_level(name), _texts()
    if name in ("gpt-4o", "tekken"):  # of other letters llama.cpp does not know the case
        texts = ["".join(c if c.isascii() else c.lower() for c in text) for text in texts]
    back = _written(tmp_path / "model", tokenizer, files_of(tokenizer))
    again = Tokenizer.from_str(back.files["tokenizer.json"].decode())
    for text, theirs in zip(texts, _theirs(python, back.path, texts), strict=True):
        assert tokenizer.encode(text).ids == theirs == again.encode(text).ids, text


def test_phi_3_swallows_spaces_behind_its_tokens(tmp_path, peer, shared):
    """A SentencePiece tokenizer with tokens that strip what follows, in a model called phi-3."""
    folder = shared("models/stories260k")
    spec = json.loads((folder / "tokenizer.json").read_text())
    known = {t["content"] for t in spec["added_tokens"]}
    extra = ["<|endoftext|>", "<|user|>", "<|end|>", *({"</s>"} - known)]
    spec["added_tokens"] += [{"id": spec["model"]["vocab"].get(t, 512 + i), "content": t, "single_word": False,
                              "lstrip": False, "rstrip": False, "normalized": False, "special": True}
                             for i, t in enumerate(extra)]
    for token in spec["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    files = {"tokenizer.json": json.dumps(spec).encode(),
             "tokenizer_config.json": (folder / "tokenizer_config.json").read_bytes()}
    back = _written(tmp_path / "phi-3-tiny", tokenizer, files)
    again = Tokenizer.from_str(back.files["tokenizer.json"].decode())
    texts = ["<|user|>\n Once upon a time<|end|>\n<|user|>  two", "<|endoftext|>  kept", " plain  text ", "<|end|>x"]
    for text, theirs in zip(texts, _theirs(peer("llama"), back.path, texts), strict=True):
        assert tokenizer.encode(text).ids == theirs == again.encode(text).ids, text
