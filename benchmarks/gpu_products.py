"""Part of gpu.py: products with packed weights beside cuBLAS in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from gpu import Bench

from fewbits import codecs
from fewbits.runtime.dispatch import choose
from fewbits.runtime.specimen import copies, random_weight
from fewbits.runtime.triton.timing import Timed, rotation

SHAPES = ((4096, 14336), (8192, 28672), (4096, 4096))  # out, in; goals are for the first two
BATCHES = (1, 4, 16, 64, 256)
FOUR_BITS = ("int4-g128", "int4-g128-asym", "nf4", "Q4_K")
ROUNDED = "int8, activations in int8"
OTHERS = ("int8", ROUNDED, "int2-g64", "int3-g128", "Q6_K")
LEAST_BANDWIDTH = 0.8  # at batch 1
LEAST_TIMES = {1: 3.3, 16: 3.0, 64: 1.8, 256: 1.0}  # as fast as cuBLAS in float16
MOST_ERROR = {torch.float16: 1e-6, torch.bfloat16: 5e-5}  # normalised and squared, of a right product
MOST_ROUNDED = 5e-4  # of one that rounds activations to int8

Shape = tuple[int, int]
Product = Callable[[torch.Tensor], torch.Tensor]


def run(bench: Bench) -> None:
    for recipes in (FOUR_BITS, OTHERS):  # what goals are for comes first
        for shape in shapes(bench):
            compare(bench, recipes, shape)


def compare(bench: Bench, recipes: Sequence[str], shape: Shape) -> None:
    contenders = {name: ours(name, shape, torch.float16, bench) for name in recipes}
    plain = {f"cuBLAS {name}": dense(shape, dtype, bench) for name, dtype in (("float16", torch.float16),
                                                                               ("bfloat16", torch.bfloat16))}
    for batch in batches(bench):
        x = torch.randn(batch, shape[1], dtype=torch.float16, device=bench.device)
        right = {name: c for name, c in contenders.items()
                 if is_right(bench, "products", f"{name} {shape[0]}x{shape[1]}, batch {batch}", c[0][0], c[1], x,
                          MOST_ROUNDED if name == ROUNDED else MOST_ERROR[x.dtype])}
        rounds = [[partial(p, x) for p in products] for products, _, _ in right.values()]
        rounds += [[partial(p, x.to(dtype)) for p in products] for products, dtype in plain.values()]
        timed = dict(zip([*right, *plain], bench.medians(rounds), strict=True))
        for name, found in timed.items():
            nbytes = right[name][2] if name in right else 2 * shape[0] * shape[1]
            say(bench, name, shape, batch, found, nbytes, timed["cuBLAS float16"])


def shapes(bench: Bench) -> tuple[Shape, ...]:
    return ((32, 256),) if bench.rehearsed else SHAPES


def batches(bench: Bench) -> tuple[int, ...]:
    return (1, 8) if bench.rehearsed else BATCHES


def ours(name: str, shape: Shape, dtype: torch.dtype, bench: Bench) -> tuple[list[Product], torch.Tensor, int]:
    """A product with each of the rotating weights, the decoded weight, and the bytes of one."""
    q = random_weight(codecs.get("int8" if name == ROUNDED else name), shape, bench.device)
    kernel = choose(q, bench.device, only="rowwise" if name == ROUNDED else "triton")
    prepared = [kernel.prepare(c, dtype) for c in copies(q, rotation(q.nbytes, bench.device))]
    return [partial(p.matmul, bias=None) for p in prepared], q.dequantize(), q.nbytes


def dense(shape: Shape, dtype: torch.dtype, bench: Bench) -> tuple[list[Product], torch.dtype]:
    one = torch.randn(shape, dtype=dtype, device=bench.device)
    count = rotation(one.nbytes, bench.device)
    return [partial(F.linear, weight=w) for w in (one, *(one.clone() for _ in range(count - 1)))], dtype


def is_right(bench: Bench, section: str, what: str, product: Product, weight: torch.Tensor, x: torch.Tensor,
             most: float) -> bool:
    """Against the product in float64, some rows of the weight at a time. Wrong products are told, and not timed."""
    found, wrong, whole = product(x), 0.0, 0.0
    for rows in torch.arange(len(weight), device=weight.device).split(2048):
        meant = x.double() @ weight[rows].double().T
        wrong += float((found[:, rows].double() - meant).square().sum())
        whole += float(meant.square().sum())
    right = wrong <= most * whole
    if not right:
        bench.failed(section, what, f"wrong, a normalised error of {wrong / whole:.1e}")
    return right


def say(bench: Bench, name: str, shape: Shape, batch: int, timed: Timed, nbytes: int, plain: Timed) -> None:
    rate = nbytes / timed.seconds
    figures = {"us": timed.seconds * 1e6, "GB/s": rate / 1e9, "of bandwidth": rate / bench.bandwidth,
               "x cuBLAS": plain.seconds / timed.seconds}
    goals = {}
    if name in FOUR_BITS and (shape in SHAPES[:2] or bench.rehearsed):
        goals = {"of bandwidth": LEAST_BANDWIDTH} if batch == 1 else {}
        goals |= {"x cuBLAS": LEAST_TIMES[batch]} if batch in LEAST_TIMES else {}
    bench.row("products", f"{name} {shape[0]}x{shape[1]}, batch {batch}", figures, goals, ungraphed(timed))


def ungraphed(timed: Timed) -> str:
    return "" if timed.graphed else "launched call by call, not as a graph"
