"""Part of gpu.py: four bits beside torch's own kernel, bitsandbytes and gemlite, each on what it stores best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu import Bench
from gpu_products import Product, Shape, batches, is_right, ours, shapes, ungraphed

from fewbits.runtime.triton.timing import rotation

GROUP = 128
INNER_TILES = 8  # of torch's layout
SPREAD = 0.02
MOST_ERROR = 1e-4  # normalised and squared: a peer may have rounded more than its formula says
LEAST_TIMES = 1.0  # as fast as each of them, at every batch

Rival = tuple[list[Product], torch.Tensor]  # a product with each of the rotating weights, and the decoded weight


@dataclass(frozen=True)
class Peer:
    name: str
    ours: str  # the recipe with as many bits
    dtype: torch.dtype  # of activations, which both get
    make: Callable[[Shape, Bench], Rival]
    everywhere: bool = True  # it has a kernel for the CPU, too: one that can be rehearsed


def run(bench: Bench) -> None:
    for peer in PEERS:
        if bench.rehearsed and not peer.everywhere:
            bench.row("peers", peer.name, {}, note="needs a GPU")
            continue
        try:
            for shape in shapes(bench)[:2]:
                compare(bench, peer, shape)
        except ImportError:
            bench.row("peers", peer.name, {}, note="not installed")
        except Exception as error:  # whatever a peer raises: the others are measured
            bench.failed("peers", peer.name, f"{type(error).__name__}: {error}")


def compare(bench: Bench, peer: Peer, shape: Shape) -> None:
    theirs, reference = peer.make(shape, bench)
    dtype = torch.float16 if bench.rehearsed else peer.dtype  # the interpreter's tl.dot is wrong for bfloat16
    mine, decoded, _ = ours(peer.ours, shape, dtype, bench)
    for batch in batches(bench):
        what = f"{peer.ours} beside {peer.name}, {shape[0]}x{shape[1]}, batch {batch}"
        x = torch.randn(batch, shape[1], dtype=peer.dtype, device=bench.device)
        if not (is_right(bench, "peers", f"{what}: its product", theirs[0], reference, x, MOST_ERROR) and
                is_right(bench, "peers", f"{what}: our product", mine[0], decoded, x.to(dtype), MOST_ERROR)):
            continue
        us, them = bench.medians([[partial(p, x.to(dtype)) for p in mine], [partial(p, x) for p in theirs]])
        figures = {"us": us.seconds * 1e6, "its us": them.seconds * 1e6, "x": them.seconds / us.seconds}
        bench.row("peers", what, figures, {"x": LEAST_TIMES}, ungraphed(them))


def torch_int4(shape: Shape, bench: Bench) -> Rival:
    """Groups with a scale and a zero point in bfloat16: value = (code - 8) * scale + zero."""
    out, columns = shape
    codes = torch.randint(0, 16, shape, dtype=torch.int32, device=bench.device)
    lines = torch.rand(columns // GROUP, out, 2, device=bench.device).add(0.5).mul(SPREAD / 4).bfloat16()
    scale, zero = (lines[..., i].T.float().repeat_interleave(GROUP, 1) for i in range(2))
    if bench.device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, INNER_TILES)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        nibbles = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, INNER_TILES)
        product = torch.ops.aten._weight_int4pack_mm

    def one(weight: torch.Tensor, its_lines: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return product(x, weight, GROUP, its_lines)

    count = rotation(packed.nbytes + lines.nbytes, bench.device)
    products = [partial(one, packed.clone(), lines.clone()) for _ in range(count)]
    return products, (codes - 8) * scale + zero


def bitsandbytes_nf4(shape: Shape, bench: Bench) -> Rival:
    import bitsandbytes as bnb

    weight = torch.randn(shape, dtype=torch.float16, device=bench.device) * SPREAD

    def one() -> tuple[torch.Tensor, Any]:
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        return packed, state

    def product(packed: torch.Tensor, state: Any, x: torch.Tensor) -> torch.Tensor:
        return bnb.matmul_4bit(x, packed.t(), quant_state=state)

    first = one()
    made = [first, *(one() for _ in range(rotation(first[0].nbytes, bench.device) - 1))]
    return [partial(product, *m) for m in made], bnb.functional.dequantize_4bit(*first)


def gemlite_int4(shape: Shape, bench: Bench) -> Rival:
    from gemlite.core import DType, GemLiteLinearTriton

    out, columns = shape
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, device=bench.device)
    scales, zeros = ((torch.rand(out * columns // GROUP, 1, device=bench.device) + low).mul(by).half()
                     for low, by in ((0.5, SPREAD / 4), (7.0, 1.0)))

    def one() -> Product:
        layer = GemLiteLinearTriton(4, group_size=GROUP, in_features=columns, out_features=out,
                                    input_dtype=DType.FP16, output_dtype=DType.FP16)
        layer.pack(codes, scales.clone(), zeros.clone(), None)
        return layer

    weight = ((codes.view(-1, GROUP).float() - zeros.float()) * scales.float()).view(shape)
    return [one() for _ in range(rotation(out * columns // 2, bench.device))], weight


PEERS = (Peer("torch's _weight_int4pack_mm", "int4-g128-asym", torch.bfloat16, torch_int4),
         Peer("bitsandbytes nf4", "nf4", torch.float16, bitsandbytes_nf4),
         Peer("gemlite int4", "int4-g128-asym", torch.float16, gemlite_int4, everywhere=False))
