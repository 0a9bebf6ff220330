"""Text to tokens and back, as tokenizer.json and tokenizer_config.json say; Transformers is not needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import tokenizers

from fewbits.containers import gguf_tokenizer
from fewbits.containers.gguf_tokenizer import Json
from fewbits.errors import FewbitsError
from fewbits.text.core import Core, Library, Mapped
from fewbits.text.template import Templates

if TYPE_CHECKING:
    from fewbits.checkpoint import Checkpoint

OLDER = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
# tokens that end an answer whatever the files call them; llama.cpp knows the same ones
ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
        "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
        "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[")
GOES_ON = "<|end|>"  # ends no answer in models that have both tokens of one of these: their answers have parts
PARTS = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"})


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A model's tokenizer; `special` are its special tokens by name, `ends` the ids after which an answer is over."""

    core: Core
    special: dict[str, str]
    ends: frozenset[int]
    templates: Templates | None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text; with those that open and close every text, where the model has such, if `special`."""
        try:
            return self.core.encode(text, special)
        except (TypeError, UnicodeEncodeError):  # half of a surrogate pair, or a byte of an argument that is no text
            raise FewbitsError("the text is not valid Unicode") from None

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.core.decode(tokens)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **values: Any) -> list[int]:
        """Tokens of a conversation in the model's chat template, and of what opens an answer; `values` (tools …) are
        what the template may ask for besides.

        Raises:
            FewbitsError: there is no template, or it refuses the conversation.
        """
        if self.templates is None:
            raise FewbitsError("the model has no chat template", "use fewbits run --raw")
        text = self.templates.render(messages, **{**self.special, **values})
        return self.encode(text, special=False)

    @cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return self.core.size()

    def name(self, token: int) -> str:
        """A token as the vocabulary writes it; empty where there is none of that id."""
        return self.core.name(token)


def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that came with a model.

    Raises:
        FewbitsError: none did, or one that only Transformers can read.
    """
    files = checkpoint.files
    settings = _json(checkpoint, "tokenizer_config.json")
    metadata = checkpoint.facts.get("metadata") or {}
    special = _special(checkpoint, settings)
    core: Core
    try:
        if gguf_tokenizer.KEY + "tokens" in metadata and not gguf_tokenizer.outline(metadata).strips:
            core = Mapped(metadata)
        elif "tokenizer.json" in files:
            core = Library(tokenizers.Tokenizer.from_buffer(files["tokenizer.json"]))
            _add(core.core, settings, special)
        else:
            older = next((name for name in OLDER if name in files), None)
            raise FewbitsError(f"no tokenizer.json in it{f', only {older}' if older else ''}",
                               "save the tokenizer with transformers' AutoTokenizer into the directory")
    except FewbitsError as error:
        raise FewbitsError(f"{checkpoint.path}: {error}", error.hint) from None
    except Exception as error:  # tokenizers raises nothing more particular
        raise FewbitsError(f"{checkpoint.path}: tokenizer.json cannot be read: {error}") from None
    return Tokenizer(core, special, _ends(checkpoint, core, special), Templates.of(checkpoint, settings))


def _json(checkpoint: Checkpoint, name: str) -> Json:
    if name not in checkpoint.files:
        return {}
    try:
        found = json.loads(checkpoint.files[name])
    except (ValueError, RecursionError) as error:
        raise FewbitsError(f"{checkpoint.path}: {name} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise FewbitsError(f"{checkpoint.path}: {name} is not a JSON object")
    return found


def _special(checkpoint: Checkpoint, settings: Json) -> dict[str, str]:
    """Special tokens by their names in tokenizer_config.json; older directories have a file of them."""
    named = _json(checkpoint, "special_tokens_map.json") | settings
    found = {name: named.get(name) for name in gguf_tokenizer.SPECIAL} | {"cls_token": named.get("cls_token")}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _add(core: tokenizers.Tokenizer, settings: Json, special: dict[str, str]) -> None:
    """Add the tokens that only tokenizer_config.json has, in the order of their ids."""
    decoder = settings.get("added_tokens_decoder")
    listed = sorted(decoder.items(), key=lambda item: int(item[0])) if isinstance(decoder, dict) else []
    for _, token in listed:
        if core.token_to_id(token["content"]) is None:
            core.add_tokens([tokenizers.AddedToken(
                token["content"], **{k: bool(token.get(k)) for k in ("lstrip", "rstrip", "single_word", "special")},
                normalized=bool(token.get("normalized")))])
    core.add_special_tokens([text for text in special.values() if core.token_to_id(text) is None])


def _ends(checkpoint: Checkpoint, core: Core, special: dict[str, str]) -> frozenset[int]:
    stops = _json(checkpoint, "generation_config.json").get("eos_token_id", checkpoint.config.get("eos_token_id"))
    found = {i for i in (stops if isinstance(stops, list) else [stops]) if isinstance(i, int)}
    added = core.special()
    here = {name: added[name] for name in ENDS if name in added}
    if any(parts <= here.keys() for parts in PARTS):
        found.discard(here.pop(GOES_ON, -1))
    eos = core.id(special["eos_token"]) if "eos_token" in special else None
    return frozenset(found | set(here.values()) | ({eos} if eos is not None else set()))
