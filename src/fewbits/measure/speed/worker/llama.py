"""llama.cpp through the low-level interface of llama-cpp-python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .base import Engine, Json, Rows


class LlamaCpp(Engine):
    """With flash attention and without."""

    packages, ways = ("llama_cpp_python",), ("", "flash attention")

    def __init__(self, job: Json):
        import llama_cpp
        import numpy

        self.lib: Any = llama_cpp
        self.numpy: Any = numpy
        self.batch: Any = None
        self.threads, self.context, self.length = job["threads"], None, 0
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)

    def load(self, job: Json) -> None:
        if Path(job["model"]).is_dir():
            raise ValueError("it reads GGUF files only")
        self.model = self.lib.llama_model_load_from_file(job["model"].encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise ValueError("it doesn't load this file")
        self.vocabulary = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def take(self, way: str) -> None:
        self.kernel = way

    def make_room(self, sequences: int, tokens: int) -> None:
        if self.context is not None:
            self.lib.llama_batch_free(self.batch)
            self.lib.llama_free(self.context)
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * max(256, tokens), sequences
        params.n_batch = params.n_ctx
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = self.ways.index(self.kernel)
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError(f"it makes no context for {sequences} x {tokens} tokens")
        self.batch = self.lib.llama_batch_init(sequences * tokens, 0, 1)

    def begin(self, rows: Rows, room: int) -> list[int]:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.length = 0
        return self._next(rows)

    def step(self, tokens: list[int]) -> list[int]:
        return self._next([[token] for token in tokens])

    def _next(self, rows: Rows) -> list[int]:
        batch, at, lasts = self.batch, 0, []
        for k, row in enumerate(rows):
            for i, token in enumerate(row):
                batch.token[at], batch.pos[at], batch.logits[at] = token, self.length + i, i == len(row) - 1
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, k
                at += 1
            lasts.append(at - 1)
        batch.n_tokens = at
        self.length += len(rows[0])
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        logits = (self.lib.llama_get_logits_ith(self.context, i) for i in lasts)
        return [int(self.numpy.ctypeslib.as_array(x, (self.vocabulary,)).argmax()) for x in logits]
