"""The tokenizer against the embedding: every id needs a row, and special tokens have to be what they say."""

from __future__ import annotations

import json
from typing import Any

from fewbits import arch
from fewbits.checkpoint import Checkpoint
from fewbits.checks import Finding, error, warning
from fewbits.containers import sentencepiece
from fewbits.errors import FewbitsError

EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight", "shared.weight",
              "token_embd.weight")
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
SPARE = 1024  # rows without a token that padding explains


def check(checkpoint: Checkpoint) -> list[Finding]:
    """Rows of the embedding, ids of the tokenizer, special ids of the configuration."""
    rows = embedding_rows(checkpoint)
    try:
        file, tokens = _tokens(checkpoint)
    except FewbitsError as problem:
        return [warning("tokenizer", f"not checked: {problem}")]
    except (AttributeError, LookupError, TypeError, ValueError) as problem:
        return [error("tokenizer", f"is damaged: {type(problem).__name__}: {problem}")]
    found: list[Finding] = []
    config = checkpoint.config.get("text_config") or checkpoint.config
    size = config.get("vocab_size")
    if rows is not None and isinstance(size, int) and size != rows:
        found.append(error("config.json", f"vocab_size is {size}; the embedding has {rows} rows"))
    if tokens:
        found += _against_rows(file, tokens, rows)
        found += _added(checkpoint, file, tokens)
    limit = rows if rows is not None else max(tokens, default=-1) + 1
    return found + _special(checkpoint, tokens, limit)


def embedding_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of the token embedding, or None where it is not found."""
    family = arch.lookup(checkpoint.config)
    named = [w.hf for w in family.weights if w.role == "token_embd"] if family else []
    for name, entry in checkpoint.entries.items():
        if (name in named or name.endswith(EMBEDDINGS)) and len(entry.shape) == 2:
            return entry.shape[0]
    return None


def _tokens(checkpoint: Checkpoint) -> tuple[str, dict[int, str]]:
    """The file that lists the tokens, and each token by its id; empty where there is no tokenizer.

    Raises:
        FewbitsError: it cannot be read here.
        ValueError: an id is no natural number, or stands for two tokens.
    """
    files = checkpoint.files
    if "tokenizer.json" in files:
        found = json.loads(files["tokenizer.json"])
        vocab = found["model"].get("vocab") or {}
        pairs = list(vocab.items()) if isinstance(vocab, dict) else [(piece[0], i) for i, piece in enumerate(vocab)]
        return "tokenizer.json", _by_id(pairs + [(t["content"], t["id"]) for t in found.get("added_tokens") or []])
    more = list(json.loads(files["added_tokens.json"]).items()) if "added_tokens.json" in files else []
    for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
        if name in files:
            return name, _by_id([(t, i) for i, t in enumerate(sentencepiece.pieces(files[name]))] + more)
    if "vocab.json" in files:
        return "vocab.json", _by_id(list(json.loads(files["vocab.json"]).items()) + more)
    if "vocab.txt" in files:
        lines = files["vocab.txt"].decode().removesuffix("\n").split("\n")
        return "vocab.txt", dict(enumerate(lines))
    return "", {}


def _by_id(pairs: list[tuple[str, Any]]) -> dict[int, str]:
    out: dict[int, str] = {}
    for token, number in pairs:
        if type(number) is not int or number < 0:
            raise ValueError(f"the id of {token!r} is {number!r}")
        if out.setdefault(number, token) != token:
            raise ValueError(f"id {number} is {out[number]!r} and {token!r}")
    return out


def _against_rows(file: str, tokens: dict[int, str], rows: int | None) -> list[Finding]:
    size = max(tokens) + 1
    if rows is None:
        return [warning("tokenizer", "no token embedding to compare it with")]
    if size > rows:
        return [error(file, f"ids go up to {size - 1}; the embedding has {rows} rows")]
    if rows - size > max(SPARE, size // 10):
        return [warning(file, f"ids go up to {size - 1}; the embedding has {rows} rows, more than padding explains")]
    return []


def _added(checkpoint: Checkpoint, file: str, tokens: dict[int, str]) -> list[Finding]:
    """tokenizer_config.json's own list of added tokens, and the special tokens that it names."""
    config, found = _object(checkpoint, "tokenizer_config.json"), []
    decoder = config.get("added_tokens_decoder")
    known = set(tokens.values())
    for number, token in (decoder if isinstance(decoder, dict) else {}).items():
        content = token.get("content") if isinstance(token, dict) else token
        own = tokens.get(int(number)) if str(number).isdecimal() else None
        if own is not None and own != content:
            found.append(error("tokenizer_config.json", f"token {number} is {content!r}; in {file} it is {own!r}"))
        known.add(str(content))
    for name in SPECIAL:
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content not in known:
            found.append(error("tokenizer_config.json", f"{name} is {content!r}, which {file} does not have"))
    return found


def _special(checkpoint: Checkpoint, tokens: dict[int, str], limit: int) -> list[Finding]:
    found = []
    text = checkpoint.config.get("text_config") or {}
    for file, config in (("config.json", checkpoint.config | text),
                         ("generation_config.json", _object(checkpoint, "generation_config.json"))):
        for name in SPECIAL:
            value = config.get(f"{name}_id")
            for number in value if isinstance(value, list) else [value]:
                if number is None:
                    continue
                if type(number) is not int or not 0 <= number < limit:
                    found.append(error(file, f"{name}_id is {number!r}; ids go from 0 to {limit - 1}"))
                elif tokens and number not in tokens:
                    found.append(warning(file, f"{name}_id is {number}, which the tokenizer does not have"))
    return found


def _object(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint; empty where it is missing or no object, which is found elsewhere."""
    try:
        found = json.loads(checkpoint.files[name]) if name in checkpoint.files else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
