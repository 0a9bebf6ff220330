"""Integer products on GPUs: what runtime/rowwise.py computes, code for code.

Nothing waits for the GPU and no shape depends on values, so that a CUDA graph can hold it. One kernel finds the columns
of outliers, one rounds rows, one multiplies: all columns in integers, with the outliers' codes zero, then blocks that
have an outlier once more in floating point.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from fewbits.codecs.base import units
from fewbits.codecs.w8a8 import SPAN, TOP, W8A8
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.runtime.rowwise import _Rowwise
from fewbits.runtime.triton import configs
from fewbits.runtime.triton.available import current
from fewbits.runtime.triton.integers import FAR, find_outliers, multiply, round_rows

FEW = 4  # rows up to which each program that rounds a row finds the outliers of all for itself: two launches fewer
WIDEST = 8192  # columns that a program rounds at a time
LOOK = (64, 128)  # rows and columns in which a program looks for outliers
WIDE, NARROW = 256, 128  # columns that a product sums at a time: of up to 32 rows, and of more
SMALLEST = 16  # outputs of a tile at least
DECODED = 1 << 22  # weights decoded at a time for gradients
SCHEMA = ("(Tensor x, Tensor codes, Tensor by_row, Tensor? zeros, Tensor? inputs, Tensor? bias, float span, "
          "float outliers) -> Tensor")


@torch.library.custom_op("fewbits::rowwise", mutates_args=(), schema=SCHEMA)
def product(x: torch.Tensor, codes: torch.Tensor, by_row: torch.Tensor, zeros: torch.Tensor | None,
            inputs: torch.Tensor | None, bias: torch.Tensor | None, span: float, outliers: float) -> torch.Tensor:
    """`x` `[..., in]` times the int8 weight `codes` `[out, in]`, scaled by `by_row` `[out]`: `[..., out]`.

    `span`: largest magnitudes over scales of rows; `inputs`: one scale for all rows instead. Columns that reach
    `outliers` are multiplied in floating point; 0: none are.
    """
    y = _shape(x, codes)
    rows, (outs, columns) = x.numel() // x.shape[-1], codes.shape
    if not rows:
        return y
    x, device = x.contiguous(), x.device
    c = configs.lookup("rowwise", 8, columns, rows, outs, columns, device)
    split = max(1, c.split * min(rows, configs.bucket(rows)) // rows)  # what it says is for a bucket's rows at most
    k = WIDE if c.m <= 32 and columns % 16 == 0 else NARROW
    pitch = units(columns, k) * k
    apart, few = outliers > 0, rows <= FEW

    def empty(*sizes: int, dtype: torch.dtype = torch.int32, where: bool = True) -> torch.Tensor:
        return torch.empty(sizes if where else 0, dtype=dtype, device=device)

    far = (torch.empty if few else torch.zeros)(columns if apart else 0, dtype=torch.int8, device=device)
    listed = empty(1 + units(columns, FAR.value), where=apart)
    rounded, sums = empty(rows, pitch, dtype=torch.int8), empty(rows, where=zeros is not None)
    scales = inputs if inputs is not None else empty(rows, dtype=torch.float32)
    arrived = empty(units(rows, c.m) * units(outs, SMALLEST), where=split > 1)
    block = min(triton.next_power_of_2(pitch), WIDEST)

    def launch(c: configs.Config) -> None:
        tiles = units(rows, c.m) * units(outs, c.n)
        parts = empty(split, tiles, c.m * c.n, where=split > 1)
        far_parts = empty(*parts.shape, dtype=torch.float32, where=apart and split > 1)
        multiply[tiles, split](
            rounded, scales, sums, x, far, listed, codes, by_row, codes if zeros is None else zeros,
            by_row if bias is None else bias, y, parts, far_parts, arrived, rows, outs, columns, pitch,
            M=c.m, N=c.n, K=k, SPLIT=split, EVEN=columns == pitch, OUTLIERS=apart, ZEROS=zeros is not None,
            STATIC=inputs is not None, BIAS=bias is not None, num_warps=c.warps, num_stages=c.stages,
            enable_fp_fusion=False)  # a bias is added after rounding, as on the CPU

    with current(device):
        if apart and not few:
            high, wide = LOOK
            find_outliers[units(columns, wide), units(rows, high)](x, far, rows, columns, outliers, high, wide)
        round_rows[rows,](
            x, far, listed, rounded, scales, sums, arrived, scales, rows, columns, pitch, arrived.numel(), span,
            outliers, BLOCK=block, OUTLIERS=apart, ROWS=triton.next_power_of_2(rows) if apart and few else 0,
            STATIC=inputs is not None, SUMS=zeros is not None, num_warps=min(max(block // 512, 1), 16))
        configs.fitting("rowwise", c, launch)
    return y


@product.register_fake
def _fake(x: torch.Tensor, codes: torch.Tensor, *_: Any) -> torch.Tensor:
    return _shape(x, codes)


def _shape(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])


def _backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Rounding is passed by, as if it had not been."""
    wants_x, wants_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
    grad_x = gradient(g, *ctx.saved_tensors) if wants_x else None
    return grad_x, None, None, None, None, g.reshape(-1, g.shape[-1]).sum(0) if wants_bias else None, None, None


product.register_autograd(_backward, setup_context=_remember)


def gradient(g: torch.Tensor, codes: torch.Tensor, by_row: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """`g` `[..., out]` times the weight, which is decoded some columns at a time: `[..., in]`."""
    outs, columns = codes.shape
    flat, found = g.reshape(-1, outs), []
    for part in codes.split(max(1, DECODED // outs), 1):
        weight = part.float() if zeros is None else part.float() - zeros.view(-1, 1)
        found.append(flat @ (weight * by_row[:, None]).to(g.dtype))
    return torch.cat(found, 1).view(*g.shape[:-1], columns)


class Tiled(_Rowwise):
    """A prepared weight on a GPU."""

    def __init__(self, q: QTensor, dtype: torch.dtype):
        super().__init__(q, dtype)
        self.by_row = self._by_row().contiguous()

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.shape[-1] != self.shape[-1]:
            raise FewbitsError(f"activations of {x.shape[-1]} columns, a weight of {self.shape[-1]}")
        whole = isinstance(self.codec, W8A8)
        return product(x, self.planes["codes"], self.by_row, self.planes.get("zeros"), self.planes.get("inputs"), bias,
                       SPAN if whole else float(TOP), 0.0 if whole else self.outliers or 0.0)

    def grad_input(self, g: torch.Tensor) -> torch.Tensor:
        return gradient(g, self.planes["codes"], self.by_row, self.planes.get("zeros"))
