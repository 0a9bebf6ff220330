"""Sequences that Transformers computes, for models that have no native decoder: the interface of `sequences`."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import Any

import numpy as np
import torch
import transformers

from fewbits.errors import FewbitsError

UNLIMITED = 1 << 20  # tokens of a model that says nothing of its context


class Eager:
    """A loaded Transformers model."""

    def __init__(self, model: transformers.PreTrainedModel):
        if not model.can_generate() or model.main_input_name != "input_ids":
            raise FewbitsError(f"{type(model).__name__} writes no text")
        text: Any = model.config.get_text_config()
        self.model, self.vocabulary = model, int(text.vocab_size)
        self.context = int(getattr(text, "max_position_embeddings", None) or UNLIMITED)

    def sequence(self, capacity: int | None = None) -> EagerSequence:
        """An empty sequence with room for `capacity` tokens, by default for the model's whole context."""
        return EagerSequence(self, self.context if capacity is None else capacity)


class EagerSequence:
    """A sequence of tokens; its cache is Transformers'."""

    def __init__(self, eager: Eager, capacity: int):
        self._model, self._capacity = eager.model, capacity
        self._tokens: list[int] = []
        self._cache: Any = None
        self._cached = 0  # tokens that the cache has

    def __len__(self) -> int:
        return len(self._tokens)

    def append(self, tokens: Tokens[int], last_only: bool = True) -> np.ndarray:
        """Logits after the last of `tokens`, `[1, vocabulary]`; after each of them unless `last_only`.

        Raises:
            FewbitsError: no tokens, or more than there is room for.
        """
        if not tokens or len(self) + len(tokens) > self._capacity:
            raise FewbitsError(f"prompt of {len(tokens)} tokens after {len(self)}, context {self._capacity}")
        new = [*self._tokens[self._cached:], *tokens]
        cache, self._cache, cached, self._cached = self._cache, None, self._cached, 0  # an interrupt spoils it
        with torch.inference_mode():
            ids = torch.tensor([new], device=self._model.device)
            out = self._model(input_ids=ids, past_key_values=cache, use_cache=True,
                              logits_to_keep=1 if last_only else len(tokens))
        self._tokens.extend(tokens)
        self._cache, self._cached = out.past_key_values, cached + len(new)
        return np.asarray(out.logits[0].float().cpu())

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            FewbitsError: there are fewer.
        """
        if not 0 <= length <= len(self):
            raise FewbitsError(f"a sequence of {len(self)} tokens cannot be cut to {length}")
        del self._tokens[length:]
        if length >= self._cached:
            return
        kinds = [type(layer) for layer in getattr(self._cache, "layers", ())]
        if length and set(kinds) == {transformers.cache_utils.DynamicLayer}:
            self._cache.crop(length - self._cached)
            self._cached = length
        else:  # windows and states of other kinds cannot go back: computed again with the next tokens
            self._cache, self._cached = None, 0
