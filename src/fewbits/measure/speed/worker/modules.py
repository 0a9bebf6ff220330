"""Any model of Transformers: generating, and a training step."""

from __future__ import annotations

import time
from typing import Any

from .base import Engine, Json, Rows


class Modules(Engine):
    packages: tuple[str, ...] = ("torch", "transformers")

    def __init__(self, job: Json):
        import torch
        import transformers

        self.torch: Any = torch
        self.cache: Any = None
        torch.set_num_threads(job["threads"])
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()

    def load(self, job: Json) -> None:
        self.net = self.read(job)
        if not self.net.can_generate():
            raise ValueError(f"{type(self.net).__name__} writes no text")
        self.net.eval().requires_grad_(False)

    def read(self, job: Json) -> Any:
        """The model."""
        raise NotImplementedError

    def begin(self, rows: Rows, room: int) -> list[int]:
        self.cache = None
        return self._next(rows, True)

    def step(self, tokens: list[int]) -> list[int]:
        return self._next([[token] for token in tokens], True)

    def whole(self, rows: Rows) -> list[int]:
        self.cache = None
        return self._next(rows, False)

    def _next(self, rows: Rows, keep: bool) -> list[int]:
        with self.torch.inference_mode():
            out = self.net(input_ids=self.torch.tensor(rows), past_key_values=self.cache, use_cache=keep,
                           logits_to_keep=1)
        self.cache = out.past_key_values if keep else None
        found: list[int] = out.logits[:, -1].argmax(-1).tolist()
        return found

    def train(self, rows: Rows) -> Json:
        ids = self.torch.tensor(rows)
        entered = self.net.get_input_embeddings()(ids).detach().requires_grad_()
        began = time.perf_counter()
        loss = self.net(inputs_embeds=entered, labels=ids, use_cache=False).loss
        between = time.perf_counter()
        loss.backward()
        return {"forward": between - began, "backward": time.perf_counter() - between}
