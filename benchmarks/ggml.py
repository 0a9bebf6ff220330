"""Products of ggml's CPU backend, the library inside llama.cpp, called through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from fewbits.qtensor import QTensor

# numbers of ggml's types
TYPES = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13,
         "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39}
EXTRA = 320  # where a tensor of ggml names who repacks it, or nobody


class Llama:
    """ggml's CPU backend."""

    class Init(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

    def __init__(self, folder: Path, threads: int):
        self.base, self.cpu = (ctypes.CDLL(str(folder / f"lib{n}.so"), mode=ctypes.RTLD_GLOBAL)
                               for n in ("ggml-base", "ggml-cpu"))
        for name in ("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph",
                     "ggml_backend_alloc_ctx_tensors_from_buft", "ggml_backend_get_default_buffer_type"):
            getattr(self.base, name).restype = ctypes.c_void_p
        self.buffers: list[ctypes.c_void_p] = []
        self.contexts: list[ctypes.c_void_p] = []
        for name in ("ggml_backend_cpu_init", "_Z35ggml_backend_cpu_repack_buffer_typev"):
            getattr(self.cpu, name).restype = ctypes.c_void_p
        self.backend = ctypes.c_void_p(self.cpu.ggml_backend_cpu_init())
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, threads)

    def _context(self) -> ctypes.c_void_p:
        self.base.ggml_init.argtypes = [Llama.Init]
        self.contexts.append(ctypes.c_void_p(self.base.ggml_init(Llama.Init(1 << 20, None, True))))
        return self.contexts[-1]

    def _allocate(self, context: ctypes.c_void_p, kind: ctypes.c_void_p) -> None:
        self.buffers.append(ctypes.c_void_p(self.base.ggml_backend_alloc_ctx_tensors_from_buft(context, kind)))

    def free(self) -> None:
        """Everything that the last `works` needed."""
        for buffer in self.buffers:
            self.base.ggml_backend_buffer_free(buffer)
        for context in self.contexts:
            self.base.ggml_free(context)
        self.buffers, self.contexts = [], []

    def works(self, q: QTensor, x: torch.Tensor, copies: int, repack: bool) -> list[Callable[[], object]]:
        """Products of `x` with as many copies of a weight; none where it cannot be repacked."""
        base, kind = self.base, TYPES[q.codec.name]
        plain = ctypes.c_void_p(base.ggml_backend_get_default_buffer_type(self.backend))
        buffer_type = ctypes.c_void_p(self.cpu._Z35ggml_backend_cpu_repack_buffer_typev()) if repack else plain
        rows, columns = q.shape
        works: list[Callable[[], object]] = []
        held, acts = self._context(), self._context()
        size = ctypes.c_int64
        weights = [ctypes.c_void_p(base.ggml_new_tensor_2d(held, kind, size(columns), size(rows)))
                   for _ in range(copies)]
        self._allocate(held, buffer_type)
        if repack and not ctypes.c_void_p.from_address(weights[0].value + EXTRA).value:  # type: ignore[operator]
            return []
        data = q.planes["blocks"].contiguous()
        for w in weights:
            base.ggml_backend_tensor_set(w, ctypes.c_void_p(data.data_ptr()), ctypes.c_size_t(0),
                                         ctypes.c_size_t(data.numel()))
        given = ctypes.c_void_p(base.ggml_new_tensor_2d(acts, 0, size(columns), size(len(x))))
        products = [ctypes.c_void_p(base.ggml_mul_mat(acts, w, given)) for w in weights]
        self._allocate(acts, plain)
        base.ggml_backend_tensor_set(given, ctypes.c_void_p(x.data_ptr()), ctypes.c_size_t(0),
                                     ctypes.c_size_t(x.numel() * 4))
        for product in products:
            graphs = self._context()
            graph = ctypes.c_void_p(base.ggml_new_graph(graphs))
            base.ggml_build_forward_expand(graph, product)
            works.append(lambda graph=graph: base.ggml_backend_graph_compute(self.backend, graph))  # type: ignore[misc]
        self.last = products[-1]
        return works

    def result(self, rows: int, columns: int) -> torch.Tensor:
        out = torch.empty(rows, columns)
        self.base.ggml_backend_tensor_get(self.last, ctypes.c_void_p(out.data_ptr()), ctypes.c_size_t(0),
                                          ctypes.c_size_t(out.numel() * 4))
        return out
