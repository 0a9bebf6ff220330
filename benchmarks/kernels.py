"""Native products beside the peers', in one run: matrix-vector, 4, 16 and 512 rows, and what the machine can do.

    python benchmarks/kernels.py [--types Q4_0 …] [--rows 1 16] [--threads 1] [--shapes 4096x4096] [--no-peers]

Weights rotate over more than 256 MB, so that no cache holds them; rounding the activations is included on both sides.
Ours and llama.cpp's (ggml's own library: a graph of one product, with and without repacking of weights, the better
counts) take turns; medians. Beside nf4 and int8 bitsandbytes, beside int4-g128 GPTQModel with the kernel it chooses,
each in its own process before ours. The machine's limits are measured in the beginning and in the end; the better one
counts.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ggml
import torch
from baselines import Peers
from common import ROOT, parser, show

import fewbits
from fewbits import _native, codecs
from fewbits.cli.common import quiet_libraries
from fewbits.runtime import cpu
from fewbits.runtime.specimen import random_weight

TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
         "TQ2_0", "int2-g128", "int3-g128", "int4-g128", "int8-g128", "nf4", "fp4", "int8"]
ROWS = (1, 4, 16, 512)
ROTATED_BYTES = 256 << 20
SECONDS = 0.25  # at least, of each measurement
PAUSE = 0.02  # seconds; threads that wait for work spin for less
PEERS = {"nf4": ("bnb", "nf4"), "int8": ("bnb", "int8"), "int4-g128": ("gptq", "gptq")}  # type -> environment, kind

Work = Callable[[], object]


def medians(works: Sequence[Sequence[Work]]) -> list[float]:
    """Seconds of the median call in each list; the lists take turns, a round of each."""
    taken: list[list[float]] = [[] for _ in works]
    began, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - began < SECONDS * len(works):
        for mine, calls in zip(taken, works, strict=True):
            time.sleep(PAUSE)
            for work in calls:
                start = time.perf_counter()
                work()
                mine.append(time.perf_counter() - start)
        rounds += 1
    return [statistics.median(t) for t in taken]


def copies_of(m: cpu.Matrix, count: int) -> list[cpu.Matrix]:
    found = [m]
    for _ in range(count - 1):
        planes = {}
        for name, plane in m.planes.items():
            planes[name] = cpu._empty(plane.numel()).copy_(plane)
        found.append(cpu.Matrix(m.form, m.rows, m.columns, m.unit, m.dtype, planes))
    return found


def limits(threads: int) -> tuple[float, float]:
    """GB/s read from memory, and Gop/s of integer dot products; the most of a few tries."""
    buffer = cpu._empty(512 << 20).fill_(1)
    rounds = 2_000_000
    read, dots = (min(medians([[work]])[0] for _ in range(3)) for work in (
        lambda: _native.probe_read(buffer, threads), lambda: _native.probe_dots(rounds, threads)))
    return buffer.numel() / read / 1e9, rounds * _native.PROBE_OPERATIONS * threads / dots / 1e9


def of_peer(peers: Peers, tokenizer: Path, name: str, shape: tuple[int, int], rows: Sequence[int],
            threads: int) -> dict[int, float]:
    """Count of rows -> seconds; a model needs some `tokenizer`, that of a model's folder."""
    environment, kind = PEERS[name]
    job: dict[str, Any] = {"kind": kind, "shape": shape, "rows": list(rows), "threads": threads, "seconds": SECONDS,
                           "bytes": ROTATED_BYTES, "found": str(peers.work / "products.json")}
    if kind == "gptq":
        job |= {"model": str(one_layer(peers.work, tokenizer, shape)), "layer": "model.layers.0.mlp.up_proj"}
    peers.run(environment, "peer_products.py", job=job)
    return {int(n): s for n, s in json.loads((peers.work / "products.json").read_text()).items()}


def one_layer(work: Path, tokenizer: Path, shape: tuple[int, int]) -> Path:
    """A random Llama of one block whose `up_proj` has the shape, as an int4-g128 directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    out = work / f"int4-g128-{shape[0]}x{shape[1]}"
    if not out.exists():
        with tempfile.TemporaryDirectory() as folder:
            config = LlamaConfig(hidden_size=shape[1], intermediate_size=shape[0], num_hidden_layers=1,
                                 num_attention_heads=32, num_key_value_heads=8, vocab_size=256, dtype="float16")
            LlamaForCausalLM(config).half().save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(tokenizer / name, folder)
            fewbits.quantize(folder, out, "int4-g128", solver="nearest", calibration="none", finish="off")
    return out


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--peers", type=Path, default=ROOT / ".peers")
    p.add_argument("--no-peers", action="store_true", help="ours alone")
    p.add_argument("--types", nargs="*", default=TYPES)
    p.add_argument("--rows", nargs="*", type=int, default=ROWS)
    p.add_argument("--shapes", nargs="*", default=["4096x4096", "14336x4096"], help="output x input")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = p.parse_args()
    quiet_libraries()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    peers = None if args.no_peers else Peers(args.peers.absolute(), args.work.absolute())
    llama = None
    if peers:
        folder, = (args.peers / "llama").glob("lib/python*/site-packages/llama_cpp/lib")
        llama = ggml.Llama(folder, args.threads)
    before, found = limits(args.threads), []
    for shape in [tuple(map(int, s.split("x"))) for s in args.shapes]:
        for name in args.types:
            theirs = (of_peer(peers, args.models / "smollm2-135m", name, shape, args.rows, args.threads)
                      if peers and name in PEERS else {})
            found += compare(name, shape, args.rows, args.threads, llama, theirs)
    read, dots = map(max, before, limits(args.threads))
    table, one = [], {}
    for name, shape, count, nbytes, seconds, theirs in found:
        one[name, shape] = seconds if count == 1 else one.get((name, shape), math.nan)
        rates = nbytes / seconds / 1e9, 2 * count * math.prod(shape) / seconds / 1e9
        table.append((name, "x".join(map(str, shape)), count, seconds * 1e3, seconds / one[name, shape], rates[0],
                      rates[0] / read, rates[1], rates[1] / dots,
                      *(("-", "-") if math.isnan(theirs) else (theirs * 1e3, theirs / seconds))))
    show(f"Products on the CPU, {args.threads} thread(s), {_native.current()}; it reads {read:.1f} GB/s and does "
         f"{dots:.0f} Gop/s of dot products",
         ("type", "shape", "rows", "ms", "x 1 row", "GB/s", "of the read", "Gop/s", "of the dots", "peer's ms",
          "x as fast"), table, args.json)


def compare(name: str, shape: tuple[int, int], counts: Sequence[int], threads: int, llama: ggml.Llama | None,
            peer: dict[int, float]) -> list[tuple[str, tuple[int, int], int, int, float, float]]:
    """Type, shape, rows, bytes, seconds of ours and of the peer (nan where there is none)."""
    q = random_weight(codecs.get(name), shape)
    native = cpu.Native(q, torch.float32)
    nbytes = sum(plane.numel() for plane in native.planes.values())
    copies, found = copies_of(native.matrices[0], -(-ROTATED_BYTES // nbytes)), []
    held = [llama.hold(q, len(copies), repack) for repack in (False, True)] if llama and name in ggml.TYPES else []
    for count in counts:
        x, out = torch.randn(count, shape[1]), torch.empty(count, shape[0])
        few = copies if count <= 16 else copies[:2]

        def work(m: cpu.Matrix, x: torch.Tensor = x, out: torch.Tensor = out) -> None:
            _native.multiply([m.weight], _native.Rounded(x, threads), [out], [None], threads)

        works: list[list[Work]] = [[lambda m=m: work(m) for m in few]]  # type: ignore[misc]
        for weights in held:
            if llama and weights:
                works.append(llama.works(weights[:len(few)], x))
                works[0][0](), works[-1][-1]()
                error = (llama.result(count, shape[0]) - out).square().sum() / out.square().sum()
                assert error < 1e-3, f"{name}: the two results differ by {error:.1e}"
        ours, *others = medians(works)
        found.append((name, shape, count, nbytes, ours, min(others, default=peer.get(count, math.nan))))
        print(name, shape, count, *(f"{s * 1e3:.3f}" for s in found[-1][-2:]), flush=True)
    if llama:
        llama.free()
    return found


if __name__ == "__main__":
    main()
