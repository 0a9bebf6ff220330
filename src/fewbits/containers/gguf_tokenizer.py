"""Tokenizers between GGUF metadata and `tokenizer.json`: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

SentencePiece merges whichever neighbours make the piece of highest score, `tokenizer.json` lists pairs by rank: ranks
follow from scores, and scores from ranks where every pair that makes a piece is listed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewbits.containers import sentencepiece
from fewbits.containers.gguf_file import Value
from fewbits.containers.gguf_pretokenizer import ADD_BOS, ALIASES, PRE, SPACE, pre_name, space_prefix
from fewbits.errors import FewbitsError

Json = dict[str, Any]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPECIALS = (UNKNOWN, CONTROL)  # have no text
ADDED = (*SPECIALS, USER_DEFINED)  # stand for themselves in a text
KEY = "tokenizer.ggml."
# names in tokenizer_config.json <-> keys in GGUF (whose spelling of "separator" is this)
# llama.cpp lets added tokens swallow the spaces behind them in models of such names, but for these tokens
STRIPPING, NOT_STRIPPING = ("phi-3", "phi3"), ("<unk>", "<s>", "<|endoftext|>")
SPECIAL = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
           "pad_token": "padding_token_id", "sep_token": "seperator_token_id", "mask_token": "mask_token_id"}

# GGUF -> tokenizer.json ---------------------------------------------------------------------------------------------
def tokenizer_json(metadata: Mapping[str, Value]) -> bytes:
    """`tokenizer.json` of a GGUF file.

    Raises:
        FewbitsError: a tokenizer model or pre-tokenizer that is not in the table.
    """
    return json.dumps(parts(metadata), ensure_ascii=False).encode()


def parts(metadata: Mapping[str, Value]) -> Json:
    """What `tokenizer.json` of a GGUF file holds.

    Raises:
        FewbitsError: a tokenizer model or pre-tokenizer that is not in the table.
    """
    found = outline(metadata)
    tokens, model = list(found.tokens), found.spec["model"]
    model["vocab"] = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(model["vocab"]) != len(tokens):
        repeated = next(t for i, t in enumerate(tokens) if model["vocab"][t] != i)
        raise FewbitsError(f"{KEY}tokens holds {repeated!r} twice")
    if found.merges is not None:
        model["merges"] = _pairs(found.merges)
    elif found.scores is not None:
        model["merges"] = merges_from_scores(tokens, found.types, found.scores)
    found.spec["added_tokens"] = [
        {"id": int(i), "content": tokens[i], "single_word": False, "lstrip": False,
         "rstrip": found.strips and tokens[i] not in NOT_STRIPPING, "normalized": False,
         "special": bool(found.types[i] != USER_DEFINED)} for i in np.flatnonzero(np.isin(found.types, ADDED))]
    return found.spec


@dataclass(frozen=True)
class Outline:
    """A tokenizer as metadata have it: `spec` is tokenizer.json without tokens, merges and added tokens."""

    spec: Json
    tokens: Sequence[str]
    types: np.ndarray
    merges: Sequence[str] | None  # pairs with a space between; or there are scores
    scores: np.ndarray | None
    unknown: int  # the token of what has none
    strips: bool  # whether added tokens swallow the spaces behind them


def outline(metadata: Mapping[str, Value]) -> Outline:
    """The tokenizer of a GGUF file, its lists untouched.

    Raises:
        FewbitsError: a tokenizer model or pre-tokenizer that is not in the table.
    """
    get = _getter(metadata)
    model, tokens = get("model"), get("tokens")
    if tokens is None or model not in ("gpt2", "llama"):
        raise FewbitsError(f"{KEY}model is {model!r}; gpt2 and llama can be turned into tokenizer.json",
                           "tokenize with another copy of the model's tokenizer")
    types = np.asarray(get("token_type", np.full(len(tokens), NORMAL)))
    if len(types) != len(tokens):
        raise FewbitsError(f"{KEY}token_type has {len(types)} entries for {len(tokens)} tokens")
    name = metadata.get("general.name")
    strips = name is not None and stripping(str(name.value))
    scores = None if model == "gpt2" else np.asarray(get("scores", np.zeros(len(tokens), np.float32)))
    if scores is not None and len(scores) != len(tokens):
        raise FewbitsError(f"{KEY}scores has {len(scores)} entries for {len(tokens)} tokens")
    unknown = get("unknown_token_id", 0)
    steps = _gpt2(get) if model == "gpt2" else _llama(get, tokens, unknown)
    spec = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
            "normalizer": steps["normalizer"], "pre_tokenizer": steps["pre_tokenizer"],
            "post_processor": _template(get, tokens), "decoder": steps["decoder"], "model": steps["model"]}
    return Outline(spec, tokens, types, get("merges", []) if model == "gpt2" else None, scores, unknown, strips)


def stripping(name: str) -> bool:
    """Whether llama.cpp strips spaces behind the added tokens of a model of this `general.name`."""
    return any(part in name.lower() for part in STRIPPING)


TYPES = {"STRING": ("model", "pre"), "BOOL": ("add_bos_token", "add_eos_token", "add_space_prefix"),
         "ARRAY STRING": ("tokens", "merges"), "ARRAY FLOAT32": ("scores",), "ARRAY INT32": ("token_type",),
         "UINT32": tuple(SPECIAL.values())}
EXPECTED = {key: kind for kind, keys in TYPES.items() for key in keys}


def _getter(metadata: Mapping[str, Value]) -> Any:
    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(KEY + key)
        if value is None:
            return default
        if f"{value.type} {value.items}".strip().replace("UINT32", "INT32") != EXPECTED[key].replace("UINT32", "INT32"):
            raise FewbitsError(f"{KEY}{key} is of type {value.type} {value.items}; {EXPECTED[key]} is expected")
        return value.value
    return get


def _pre_name(get: Any) -> str:
    name = get("pre", "")
    return ALIASES.get(name, name)


def _gpt2(get: Any) -> Json:
    if _pre_name(get) not in PRE:
        raise FewbitsError(f"{KEY}pre is {get('pre')!r}; known here: {', '.join([*PRE, *filter(None, ALIASES)])}",
                           "tokenize with another copy of the model's tokenizer")
    pre, ignore_merges, normalizer = PRE[_pre_name(get)]
    return {"normalizer": normalizer, "pre_tokenizer": pre,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": _model(None, False, ignore_merges)}


def _pairs(merges: Sequence[str]) -> list[tuple[str, ...]]:
    found = [tuple(merge.split(" ")) for merge in merges]
    for i, pair in enumerate(found):
        if len(pair) != 2:
            found[i] = _pair(" ".join(pair), i)
    return found


def _pair(merge: str, i: int) -> tuple[str, str]:
    left, space, right = merge.partition(" ") if not merge.startswith(" ") else (" ", *merge[1:].partition(" ")[1:])
    if not space:
        raise FewbitsError(f"{KEY}merges[{i}] is {merge!r}: no pair")
    return left, right


def _llama(get: Any, tokens: Sequence[str], unknown: int) -> Json:
    prefix = get("add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[Json] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                            {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
            if prefix else replace,
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders + (
                [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else [])},
            "model": _model(tokens[unknown] if 0 <= unknown < len(tokens) else None, True, False)}


def _model(unknown: str | None, byte_fallback: bool, ignore_merges: bool) -> Json:
    return {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": byte_fallback, "byte_fallback": byte_fallback,
            "ignore_merges": ignore_merges, "vocab": {}, "merges": []}


def merges_from_scores(tokens: list[str], types: np.ndarray, scores: np.ndarray) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the highest score first; ties by token, then by the parts."""
    score = scores.tolist()
    pieces = {tokens[i]: int(i) for i in np.flatnonzero(np.isin(types, (NORMAL, UNUSED)))}
    found = []
    for piece, i in pieces.items():
        for at in range(1, len(piece)):
            left, right = pieces.get(piece[:at]), pieces.get(piece[at:])
            if left is not None and right is not None:
                found.append((-score[i], i, left, right))
    found.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in found]


def _template(get: Any, tokens: Sequence[str]) -> Json | None:
    add_bos = get("add_bos_token", get("model") == "llama" or _pre_name(get) in ADD_BOS)
    add_eos = get("add_eos_token", False)
    ends = [get("bos_token_id", 1) if add_bos else None, get("eos_token_id", 2) if add_eos else None]
    for name, i in zip(("bos", "eos"), ends, strict=True):
        if i is not None and not 0 <= i < len(tokens):
            raise FewbitsError(f"{KEY}{name}_token_id is {i}, of {len(tokens)} tokens")
    bos, eos = ([] if i is None else [{"SpecialToken": {"id": tokens[i], "type_id": 0}}] for i in ends)
    if not (bos or eos):
        return None

    def part(name: str) -> list[Json]:
        return [*bos, {"Sequence": {"id": name, "type_id": 0}}, *eos]

    return {"type": "TemplateProcessing", "single": part("A"), "pair": part("A") + part("B"),
            "special_tokens": {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]}
                               for i in ends if i is not None}}


def tokenizer_config(metadata: Mapping[str, Value]) -> bytes:
    """`tokenizer_config.json` of a GGUF file: special tokens by name, and the chat template."""
    get = _getter(metadata)
    tokens = get("tokens", [])
    config: Json = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in SPECIAL.items():
        token = get(key)
        if token is not None and 0 <= token < len(tokens):
            config[name] = tokens[token]
    template = metadata.get("tokenizer.chat_template")
    named = [{"name": k.rpartition(".")[2], "template": v.value} for k, v in metadata.items()
             if k.startswith("tokenizer.chat_template.")]
    if named:
        config["chat_template"] = ([{"name": "default", "template": template.value}] if template else []) + named
    elif template:
        config["chat_template"] = template.value
    return json.dumps(config, ensure_ascii=False, indent=2).encode()


# tokenizer.json -> GGUF ---------------------------------------------------------------------------------------------
def to_metadata(files: Mapping[str, bytes], config: Json, rows: int, name: str = "") -> dict[str, Value]:
    """`tokenizer.*` metadata of a Transformers directory's files, for an embedding of `rows` rows.

    `name` is the file's `general.name`, which llama.cpp looks at too.

    Raises:
        FewbitsError: a tokenizer that GGUF has no name for.
    """
    if "tokenizer.json" not in files:
        if "tokenizer.model" in files or "vocab.json" in files:
            raise FewbitsError("tokenizer.json is missing beside the older tokenizer files",
                               "save the tokenizer with transformers' AutoTokenizer first")
        return {KEY + "model": Value("STRING", "no_vocab")}
    spec = json.loads(files["tokenizer.json"])
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    model = spec["model"]
    if model.get("type", "BPE") != "BPE":
        raise FewbitsError(f"tokenizer.json has a {model.get('type')} model; GGUF takes BPE here")
    if model.get("dropout") or model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        raise FewbitsError("tokenizer.json has BPE dropout, prefixes or suffixes, which GGUF cannot hold")
    model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    spm = bool(model.get("byte_fallback"))
    tokens, types = _tokens(spec, rows, spm, stripping(name))
    out = {KEY + "model": Value("STRING", "llama" if spm else "gpt2")}
    if spm:
        out[KEY + "pre"] = Value("STRING", "default")
        out[KEY + "add_space_prefix"] = Value("BOOL", space_prefix(spec))
    else:
        out[KEY + "pre"] = Value("STRING", pre_name(spec))
    out[KEY + "tokens"] = Value("ARRAY", tokens, "STRING")
    if spm:
        proto = sentencepiece.scores(files["tokenizer.model"]) if "tokenizer.model" in files else None
        scores = scores_from_merges(model["merges"], tokens, types) if proto is None else np.array(
            [proto.get(t.replace(" ", SPACE), -1000.0) for t in tokens], np.float32)
        out[KEY + "scores"] = Value("ARRAY", scores, "FLOAT32")
    out[KEY + "token_type"] = Value("ARRAY", np.array(types, np.int32), "INT32")
    if not spm:
        out[KEY + "merges"] = Value("ARRAY", [" ".join(m) for m in model["merges"]], "STRING")
    return out | _special(spec, settings, config, tokens) | _templates(files, settings)


def _tokens(spec: Json, rows: int, spm: bool, strips: bool) -> tuple[list[str], list[int]]:
    """Tokens and types of `rows` ids; ids that no token has are filled up, tokens past the embedding left out."""
    by_id = {i: token for token, i in spec["model"]["vocab"].items() if i < rows}
    kinds = {i: BYTE for i, token in by_id.items() if spm and re.fullmatch("<0x[0-9A-F]{2}>", token)}
    for added in spec.get("added_tokens", []):
        if added["id"] >= rows:
            continue
        right = strips and added["content"] not in NOT_STRIPPING
        if added.get("lstrip") or added.get("single_word") or bool(added.get("rstrip")) != right:
            raise FewbitsError(f"the added token {added['content']!r} strips its surroundings or stands for single "
                               f"words{' or should' if right else ''}, which GGUF cannot say",
                               "another container keeps tokenizer.json as it is"
                               + ("; of Phi-3, a directory named phi-3 says it" if added.get("rstrip") else ""))
        plain = spm and not added["special"]
        by_id[added["id"]] = added["content"].replace(SPACE, " ") if plain else added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if spm and spec["model"].get("unk_token") in spec["model"]["vocab"]:
        unknown = spec["model"]["vocab"][spec["model"]["unk_token"]]
        kinds[unknown] = UNKNOWN if kinds.get(unknown, NORMAL) == NORMAL else kinds[unknown]
    types = [kinds.get(i, NORMAL) if i in by_id else UNUSED for i in range(rows)]
    return [by_id.get(i, f"[PAD{i}]") for i in range(rows)], types


def scores_from_merges(merges: list[list[str]], tokens: list[str], types: list[int]) -> np.ndarray:
    """SentencePiece scores that merge in the order of `merges`.

    Raises:
        FewbitsError: no scores do: a piece can be put together in a way that is not listed, or the pairs that make one
            piece are not neighbours in the list.
    """
    order: dict[str, int] = {}  # piece -> its place among pieces in order of merging
    before = ""
    for left, right in merges:
        piece = left + right
        if piece in order and piece != before:
            raise FewbitsError(f"the merges that make the token {piece!r} do not stand together: no scores say so",
                               "another container keeps tokenizer.json as it is")
        order.setdefault(piece, len(order))
        before = piece
    pieces = {t for t, kind in zip(tokens, types, strict=True) if kind in (NORMAL, UNUSED)}
    listed = {(left, right) for left, right in merges}
    reachable = {t for t in pieces if len(t) == 1} | order.keys()
    for piece in pieces:
        for at in range(1, len(piece)):
            pair = piece[:at], piece[at:]
            if pair not in listed and pair[0] in reachable and pair[1] in reachable:
                raise FewbitsError(f"the merges never make the token {piece!r} of {pair[0]!r} and {pair[1]!r}; "
                                   "SentencePiece, as GGUF knows it, would",
                                   "another container keeps tokenizer.json as it is")
    scores = np.full(len(tokens), -1000.0, np.float32)
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == BYTE:
            scores[i] = 0.0
        elif kind in (NORMAL, UNUSED):
            scores[i] = -float(order.get(token, len(order) + i))
    return scores


def _special(spec: Json, settings: Json, config: Json, tokens: list[str]) -> dict[str, Value]:
    """Ids of special tokens, and which of them open and close a text."""
    ids = {token: i for i, token in enumerate(tokens)}
    out = {}
    for name, key in SPECIAL.items():
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        found = ids.get(token) if token is not None else config.get(f"{name}_id")
        found = found[0] if isinstance(found, list) else found
        if isinstance(found, int) and 0 <= found < len(tokens):
            out[KEY + key] = Value("UINT32", found)
    first, last = _ends(spec.get("post_processor"))
    for name, key, text in (("bos", "add_bos_token", first), ("eos", "add_eos_token", last)):
        if text is not None and ids.get(text) != getattr(out.get(KEY + f"{name}_token_id"), "value", None):
            raise FewbitsError(f"tokenizer.json puts {text!r} around every text, which is not its {name}_token; "
                               "GGUF cannot say that")
        out[KEY + key] = Value("BOOL", text is not None)
    return out


def _ends(post: Json | None) -> tuple[str | None, str | None]:
    """The special tokens that a post-processor puts before and after a text."""
    if post is None or post["type"] == "ByteLevel":
        return None, None
    if post["type"] == "Sequence":
        found = [_ends(p) for p in post["processors"]]
        return next((a for a, _ in found if a), None), next((b for _, b in found if b), None)
    names = [part.get("SpecialToken", {}).get("id") for part in post.get("single", [])]
    if post["type"] != "TemplateProcessing" or names.count(None) != 1 or len(names) > 3:
        raise FewbitsError(f"GGUF cannot say the post-processor {json.dumps(post)[:200]}")
    at = names.index(None)
    if at > 1 or len(names) - at > 2:
        raise FewbitsError(f"GGUF cannot say the post-processor {json.dumps(post)[:200]}")
    return (names[0] if at else None), (names[-1] if at < len(names) - 1 else None)


def _templates(files: Mapping[str, bytes], settings: Json) -> dict[str, Value]:
    template = settings.get("chat_template")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode()
    if not template:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": Value("STRING", template)}
    named = {t["name"]: t["template"] for t in template}
    out = {"tokenizer.chat_template": Value("STRING", named.pop("default"))} if "default" in named else {}
    if named:
        out["tokenizer.chat_templates"] = Value("ARRAY", list(named), "STRING")
        out |= {f"tokenizer.chat_template.{k}": Value("STRING", v) for k, v in named.items()}
    return out
