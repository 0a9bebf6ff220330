"""Text from a loaded model, piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits.errors import FewbitsError
from fewbits.loading import checkpoint_of, load, tokenizer


@dataclass(frozen=True)
class Answer:
    """What was generated, and how fast."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Session:
    """A model and its tokenizer, ready to talk."""

    def __init__(self, model: str | Path, kernel: str | None = None):
        self.model = load(model, kernel=kernel)
        self.tokenizer = tokenizer(self.model)

    def encode(self, prompt: str, raw: bool = False) -> list[int]:
        """Tokens of a prompt, wrapped in the chat template where there is one, unless `raw`."""
        if raw or not self.tokenizer.chat_template:
            return self.tokenizer(prompt)["input_ids"]
        return self.encode_chat([{"role": "user", "content": prompt}])

    def check_chat(self) -> None:
        if not self.tokenizer.chat_template:
            raise FewbitsError(f"{checkpoint_of(self.model).path}: no chat template in it", "use fewbits run --raw")

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        self.check_chat()
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return list(ids)

    def generate(self, ids: list[int], *, max_tokens: int = 128, temperature: float = 0.0, seed: int = 0,
                 on_text: Callable[[str], None] | None = None) -> Answer:
        """Continue `ids`; `on_text` gets the new text in whole characters as it comes.

        Raises:
            FewbitsError: prompt and answer don't fit into the model's context.
        """
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit and len(ids) + 1 > limit:
            raise FewbitsError(f"prompt of {len(ids)} tokens, the model's context is {limit}", "shorten the prompt")
        if not ids:
            raise FewbitsError("the prompt is empty", "say something")
        began = time.monotonic()
        draw = torch.Generator().manual_seed(seed)
        stops = self._stops()
        tokens: list[int] = []
        said, cache, feed = "", None, torch.tensor([ids])
        with torch.inference_mode():
            for _ in range(min(max_tokens, limit - len(ids) if limit else max_tokens)):
                out = self.model(input_ids=feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                token = _sample(out.logits[0, -1].float(), temperature, draw)
                if token in stops:
                    break
                tokens.append(token)
                feed = torch.tensor([[token]])
                text = self._text(tokens)
                if on_text and not text.endswith("�"):
                    on_text(text[len(said):])
                    said = text
        text = self._text(tokens)
        if on_text and text != said:
            on_text(text[len(said):])
        return Answer(text, tokens, len(ids), time.monotonic() - began)

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _stops(self) -> set[int]:
        stops = self.model.generation_config.eos_token_id
        found = set(stops if isinstance(stops, list) else [stops])
        return (found | {self.tokenizer.eos_token_id}) - {None}


def _sample(logits: torch.Tensor, temperature: float, draw: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=draw))
