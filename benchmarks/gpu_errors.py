"""How far the Triton kernels are from the decoded weight, codec by codec, and models' logits from those of the CPU.

    python benchmarks/gpu_errors.py             # on the GPU if there is one, else in Triton's interpreter

Normalised squared errors against float64, activations with a mean of their own; weights of 200 outputs and 1280 columns
(1216 where the codec takes them: no whole number of blocks). Float32 shows what the layout rounds, float16 what is left
of it where results are float16.

Models: float16 on the GPU; the CPU's decoder computes in float32, and rounds the activations that meet weights of few
bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from common import parser, show

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"

from fewbits import codecs, containers  # noqa: E402
from fewbits.qtensor import QTensor  # noqa: E402
from fewbits.runtime import decoder  # noqa: E402
from fewbits.runtime.triton.engine import Gpu  # noqa: E402
from fewbits.runtime.triton.kernel import OnGpu  # noqa: E402
from fewbits.runtime.triton.layout import unfit  # noqa: E402
from fewbits.solvers import solve  # noqa: E402

NAMES = ("int4-g128", "int4-g32-asym", "int3-g128", "int2-g64", "int8-g128", "int8", "nf4", "nf4-dq", "fp4", "fp8-e4m3",
         "fp8-e4m3-b128", "kmeans4", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
         "IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0", "Q1_0")
MODELS = ("smollm2-135m", "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma3-270m", "gemma-3-270m.Q4_K_M.gguf")
OUTS, WIDTHS = 200, (1216, 1280)
TILE = 7  # rows


def weight(name: str) -> QTensor:
    torch.manual_seed(0)
    codec = codecs.get(name)
    columns = next(c for c in WIDTHS if codec.check((OUTS, c)) is None and not unfit(QTensor(codec, (OUTS, c), {})))
    return solve(torch.randn(OUTS, columns) * 0.02, codec)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double().cpu() - want).square().sum() / want.square().sum())


def errors(q: QTensor, device: torch.device) -> list[float]:
    found, decoded = OnGpu.of(q.to(device), torch.float32), q.dequantize().double()
    outs, columns = q.shape

    def product(rows: int, dtype: torch.dtype) -> float:
        x = (torch.randn(rows, columns) + 0.5).to(dtype)
        return error(found.matmul(x.to(device), None), x.double() @ decoded.T)

    g = torch.randn(TILE, outs)
    ways: list[Callable[[], float]] = [
        lambda: error(found.rows(torch.arange(outs, device=device)), decoded),
        lambda: product(1, torch.float32), lambda: product(TILE, torch.float32),
        lambda: product(1, torch.float16), lambda: product(TILE, torch.float16),
        lambda: error(found.grad_input(g.to(device)), g.double() @ decoded)]
    return [way() for way in ways]


def logits(path: Path, device: torch.device) -> float:
    """The error of a model's logits of 16 tokens on the GPU, from those of the CPU."""
    checkpoint = containers.open(path)
    tokens = list(range(100, 116))
    kernel = "triton" if INTERPRETED else None  # the CPU has others
    got = decoder.compile_for(checkpoint, Gpu(device, torch.float16, kernel)).logits(tokens)
    want = decoder.compile(checkpoint).logits(tokens)
    return error(torch.from_numpy(got), torch.from_numpy(want).double())


def main() -> None:
    args = parser(__doc__).parse_args()
    device = torch.device("cpu" if INTERPRETED else "cuda")
    where = "Triton's interpreter" if INTERPRETED else torch.cuda.get_device_name()
    rows = [[name, q.shape[1], *errors(q, device)] for name in NAMES for q in [weight(name)]]
    header = ["codec", "columns", "decoded", "1 row", f"{TILE} rows", "1 row, float16", f"{TILE} rows, float16",
              "gradient"]
    show(f"Errors of the Triton kernels, {where}", header, rows, args.json)
    found = [args.models / name for name in MODELS if (args.models / name).exists()]
    show(f"Logits of models, {where}", ["model", "error"], [[path.name, logits(path, device)] for path in found])


if __name__ == "__main__":
    main()
