"""Pre-tokenizers and normalizers: GGUF names them, `tokenizer.json` spells them out. One table holds both."""

from __future__ import annotations

import json
from typing import Any

from fewbits.errors import FewbitsError

Json = dict[str, Any]
SPACE = "▁"  # what SentencePiece writes for a space
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# words by letters of either case, as tiktoken's cl100k; how many digits stand together is filled in
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
# words by case, `camelCase` in two, as tiktoken's o200k; what may follow a word, and how many digits, are filled in
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASES = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s|\p{{N}}%s"
         r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


def _bytes(use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(regex: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _sequence(*steps: Json) -> Json:
    return {"type": "Sequence", "pretokenizers": list(steps)}


# GGUF's name -> (pre_tokenizer, ignore_merges, normalizer); a file is written with the first name that fits.
# llama.cpp normalizes no text; in gpt-4o and tekken it knows the case of ASCII letters only, and ends words at marks.
PRE: dict[str, tuple[Json, bool, Json | None]] = {
    "gpt-2": (_bytes(True), False, None),
    "olmo": (_bytes(True), False, {"type": "NFC"}),  # GPT-NeoX, Pythia, OLMo
    "smollm": (_sequence({"type": "Digits", "individual_digits": True}, _bytes(True)), False, None),
    "llama-bpe": (_sequence(_split(WORDS % "{1,3}"), _bytes(False)), True, None),
    "qwen2": (_sequence(_split(WORDS % ""), _bytes(False)), False, {"type": "NFC"}),
    "stablelm2": (_sequence(_split(WORDS % ""), _bytes(False)), False, None),
    "dbrx": (_sequence(_split(WORDS % "{1,3}"), _bytes(False)), False, None),  # OLMo 2, Phi-4
    "gpt-4o": (_sequence(_split(CASES % (SHORT, SHORT, "{1,3}")), _bytes(False)), False, None),
    "tekken": (_sequence(_split(CASES % ("", "", "")), _bytes(False)), True, None),  # Mistral Nemo
    "default": (_sequence(_split(r"[\p{P}\$\+<=>\^~\|]+"), _split(GPT2), _split(r"\p{N}+"), _split("[0-9][0-9][0-9]"),
                          _bytes(False)), False, None),
}
ALIASES = {"phi-2": "gpt-2", "exaone4": "gpt-2", "mpt": "olmo", "smaug-bpe": "dbrx", "kanana2": "gpt-4o",
           "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "lfm2": "llama-bpe",
           "deepseek-r1-qwen": "qwen2", "megrez": "qwen2", "": "default"}
ADD_BOS = {"llama-bpe"}  # what readers of GGUF take where add_bos_token is missing


def pre_name(spec: Json) -> str:
    """GGUF's name of a tokenizer.json's pre-tokenizer."""
    found = (_plain(spec.get("pre_tokenizer")), bool(spec["model"].get("ignore_merges", False)),
             _plain(spec.get("normalizer")))
    for name, (pre, ignore_merges, normalizer) in PRE.items():
        if found == (_plain(pre), ignore_merges, _plain(normalizer)):
            return name
    raise FewbitsError(f"GGUF has no name known here for the pre-tokenizer {json.dumps(found[0])[:200]} "
                       f"(ignore_merges {found[1]}, normalizer {found[2]})",
                       f"known: {', '.join(PRE)}; another container keeps tokenizer.json as it is")


def _plain(part: Any) -> Any:
    """A component without what does not matter to its tokens; a sequence of one is that one."""
    if not isinstance(part, dict):
        return part
    steps = part.get("pretokenizers") or part.get("normalizers")
    if part.get("type") == "Sequence" and steps is not None:
        return _plain(steps[0]) if len(steps) == 1 else {"type": "Sequence", "steps": [_plain(s) for s in steps]}
    if part.get("type") == "Split" and part.get("behavior") == "Removed" and part.get("invert"):
        regex = part.get("pattern", {}).get("Regex", "")
        if regex.endswith(r"|\s+"):  # it matches every text to its end: keeping matches is keeping all
            return _split(regex)
    if part.get("type") == "ByteLevel":
        return {"type": "ByteLevel", "prefix": part.get("add_prefix_space", True), "regex": part.get("use_regex", True)}
    return part


def space_prefix(spec: Json) -> bool:
    """Whether a SentencePiece-like tokenizer.json puts a space before the text."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizer, pre = _plain(spec.get("normalizer")), _plain(spec.get("pre_tokenizer"))
    # after the replacement no space is left, so splitting on spaces does nothing
    if isinstance(pre, dict) and pre.get("type") == "Split" and pre.get("pattern") == {"String": " "}:
        pre = None if normalizer is not None else pre
    if normalizer == {"type": "Sequence", "steps": [{"type": "Prepend", "prepend": SPACE}, replace]} and pre is None:
        return True
    if normalizer == replace and pre is None:
        return False
    if normalizer is None and isinstance(pre, dict) and pre.get("type") == "Metaspace" and not pre.get("split", True):
        return bool(pre.get("prepend_scheme", "always") != "never")
    raise FewbitsError(f"GGUF cannot say normalizer {json.dumps(normalizer)[:120]} with pre-tokenizer "
                       f"{json.dumps(pre)[:120]} of a SentencePiece model",
                       "another container keeps tokenizer.json as it is")
