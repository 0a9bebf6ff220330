"""Native products beside llama.cpp's, in one process: matrix-vector, 4, 16 and 512 rows, and what the machine can do.

    python benchmarks/kernels.py [--llama FOLDER] [--types Q4_0 …] [--threads 1] [--shapes 4096x4096] [--cpu-time]

Weights rotate over more than 256 MB, so that no cache holds them; the least time of several rounds counts, rounding the
activations included on both sides. llama.cpp (ggml's own library, called through ctypes) computes a graph of one
product, with and without repacking of weights: the better one counts. `--cpu-time` counts a thread's time on the
processor instead of the clock, on a busy machine with one thread.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import ROOT, parser, show

from fewbits import _native, codecs
from fewbits.qtensor import QTensor
from fewbits.runtime import cpu

TYPES = ["Q4_0", "Q4_K", "Q8_0", "Q6_K", "Q5_K", "Q3_K", "Q2_K", "IQ4_XS", "IQ4_NL", "MXFP4", "int4-g128", "nf4",
         "int8"]
GGML = {"Q4_0": 2, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
        "IQ4_NL": 20, "IQ4_XS": 23, "MXFP4": 39}
ROWS = (1, 4, 16, 512)
ROTATED_BYTES = 256 << 20
SECONDS = 0.25  # at least, of each measurement
EXTRA = 320  # where a tensor of ggml names who repacks it, or nobody


class Clock:
    def __init__(self, cpu_time: bool):
        self.now = time.thread_time if cpu_time else time.perf_counter

    def least(self, works: list[Callable[[], object]]) -> float:
        """Seconds of the fastest of `works`, called in turn."""
        best, began, rounds = math.inf, time.perf_counter(), 0
        while rounds < 3 or time.perf_counter() - began < SECONDS:
            for work in works:
                start = self.now()
                work()
                best = min(best, self.now() - start)
            rounds += 1
        return best


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
        base, kind = self.base, GGML[q.codec.name]
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


def random_weight(name: str, shape: tuple[int, int]) -> QTensor:
    """Random codes under scales of a usual size."""
    codec = codecs.get(name)
    planes = {}
    for plane, (kind, size) in codec.planes(shape).items():
        dtype = getattr(torch, kind)
        low, high = (-127, 128) if kind == "int8" else (0, 256)
        planes[plane] = (torch.randint(low, high, size, dtype=dtype) if not dtype.is_floating_point
                         else (torch.rand(size) * 0.01).to(dtype))
    q = QTensor(codec, shape, planes)
    codes, params = q.unpack()
    params = {k: torch.full_like(v, 0.01) if v.is_floating_point() else v for k, v in params.items()}
    if "exponent" in params:
        params["exponent"] = params["exponent"] % 8 + 118
    return QTensor.pack(codec, shape, codes, params)


def copies_of(m: cpu.Matrix, count: int) -> list[cpu.Matrix]:
    found = [m]
    for _ in range(count - 1):
        planes = {}
        for name, plane in m.planes.items():
            planes[name] = cpu._empty(plane.numel()).copy_(plane)
        found.append(cpu.Matrix(m.form, m.rows, m.columns, m.unit, m.dtype, planes))
    return found


def limits(clock: Clock, threads: int) -> tuple[float, float]:
    """GB/s read from memory, and Gop/s of integer dot products."""
    buffer = cpu._empty(512 << 20).fill_(1)
    read = buffer.numel() / clock.least([lambda: _native.probe_read(buffer, threads)]) / 1e9
    rounds = 2_000_000
    work = rounds * _native.PROBE_OPERATIONS * threads
    return read, work / clock.least([lambda: _native.probe_dots(rounds, threads)]) / 1e9


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--llama", type=Path, help="folder of libggml-base.so and libggml-cpu.so, built for this machine")
    p.add_argument("--types", nargs="*", default=TYPES)
    p.add_argument("--rows", nargs="*", type=int, default=ROWS)
    p.add_argument("--shapes", nargs="*", default=["4096x4096", "14336x4096"], help="output x input")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--cpu-time", action="store_true")
    options = p.parse_args()
    torch.set_num_threads(options.threads)
    found = sorted((ROOT / ".peers" / "llama").glob("lib/python*/site-packages/llama_cpp/lib"))
    folder = options.llama or (found[0] if found else None)
    llama = Llama(folder, options.threads) if folder else None
    clock, results = Clock(options.cpu_time), []
    most = limits(clock, options.threads)
    for shape in [tuple(map(int, s.split("x"))) for s in options.shapes]:
        for name in options.types:
            results += compare(name, shape, options.rows, clock, options.threads, llama, most)
    show(f"Products on the CPU, {options.threads} thread(s), {_native.current()}",
         ("type", "shape", "rows", "ms", "GB/s", "of the read", "Gop/s", "of the dots", "llama.cpp ms",
          "times as fast"), results, options.json)


def compare(name: str, shape: tuple[int, ...], counts: list[int], clock: Clock, threads: int,
            llama: Llama | None, most: tuple[float, float]) -> list[tuple[object, ...]]:
    q = random_weight(name, (shape[0], shape[1]))
    native = cpu.Native(q, torch.float32)
    nbytes = sum(plane.numel() for plane in native.planes.values())
    read, dots = most
    copies, rows = copies_of(native.matrices[0], -(-ROTATED_BYTES // nbytes)), []
    for count in counts:
        x, out = torch.randn(count, shape[1]), torch.empty(count, shape[0])

        def work(m: cpu.Matrix, x: torch.Tensor = x, out: torch.Tensor = out) -> None:
            _native.multiply([m.weight], _native.Rounded(x, threads), [out], [None], threads)

        few = copies if count <= 16 else copies[:2]
        seconds = clock.least([lambda m=m: work(m) for m in few])  # type: ignore[misc]
        theirs = math.nan
        if llama and name in GGML:
            for repack in (False, True):
                works = llama.works(q, x, len(few), repack)
                if works:
                    spent = clock.least(works)
                    error = (llama.result(count, shape[0]) - out).square().sum() / out.square().sum()
                    assert error < 1e-3, f"{name}: the two results differ by {error:.1e}"
                    theirs = spent if math.isnan(theirs) else min(theirs, spent)
                llama.free()
        operations = 2 * count * shape[0] * shape[1]
        rows.append((name, f"{shape[0]}x{shape[1]}", count, seconds * 1e3, nbytes / seconds / 1e9,
                     nbytes / seconds / 1e9 / read, operations / seconds / 1e9, operations / seconds / 1e9 / dots,
                     *((theirs * 1e3, theirs / seconds) if theirs == theirs else ("-", "-"))))
        print(*(f"{v:.3g}" if isinstance(v, float) else v for v in rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()
