"""Products of int8 weights and activations rounded to int8, on tensor cores: what runtime/rowwise.py computes.

Nothing waits for the GPU and no shape depends on values, so that a CUDA graph can hold it. One kernel finds the columns
of outliers, one rounds rows, one multiplies: all columns in integers, with the outliers' codes zero, then blocks that
have an outlier once more in floating point.

The weight stays `[out, in]` as it is stored: integer tensor cores take both operands with the summed columns adjacent,
and a transposed weight would have to be turned byte by byte on its way.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fewbits.codecs.base import units
from fewbits.codecs.w8a8 import SPAN, TOP, W8A8
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.runtime.rowwise import _Rowwise
from fewbits.runtime.triton.available import interpreted

FAR = tl.constexpr(32)  # columns of a block that is multiplied in floating point if it has an outlier
INTERPRETED = tl.constexpr(interpreted())
FEW = 4  # rows up to which each program that rounds a row finds the outliers of all for itself: two launches fewer
BAND = tl.constexpr(8)  # tiles of rows that follow each other, so that they find the weight in the second cache
WIDEST = 8192  # columns that a program rounds at a time
LOOK = (64, 128)  # rows and columns in which a program looks for outliers


class Tile(NamedTuple):
    """What a program of the product computes."""

    m: int  # rows of activations
    n: int  # outputs
    k: int  # columns at a time
    warps: int
    stages: int


TILES = {16: Tile(16, 64, 256, 4, 3), 64: Tile(64, 64, 128, 4, 4), 1 << 62: Tile(128, 128, 128, 8, 3)}  # by rows
WAVES = 2  # programs a processor that a split of the columns asks for
LEAST = 512  # columns of a part
DECODED = 1 << 22  # weights decoded at a time for gradients


@triton.jit
def _reaches(values, threshold):
    return (tl.abs(values) >= threshold) | (values != values)


@triton.jit
def find_outliers(x, far, rows, columns, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes 1 into `far` `[columns]`, zero before, where a value of `x` reaches the threshold."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(x + row[:, None] * columns + column[None, :], mask=inside, other=0).to(tl.float32)
    found = tl.max(_reaches(values, threshold).to(tl.int32), 0)
    tl.store(far + column, found.to(tl.int8), mask=found > 0)


@triton.jit
def _outliers(x, far, column, rows, columns, threshold, ROWS: tl.constexpr):
    """1 for columns of outliers, else 0: as found before, or among up to `ROWS` rows."""
    if ROWS == 0:
        return tl.load(far + column, mask=column < columns, other=0).to(tl.int32)
    row = tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(x + row[:, None] * columns + column[None, :], mask=inside, other=0).to(tl.float32)
    return tl.max(_reaches(values, threshold).to(tl.int32), 0)


@triton.jit
def _near(x, far, column, rows, columns, threshold, OUTLIERS: tl.constexpr, ROWS: tl.constexpr):
    """Values of this program's row, those of outlier columns 0."""
    row = tl.program_id(0).to(tl.int64)
    values = tl.load(x + row * columns + column, mask=column < columns, other=0).to(tl.float32)
    if OUTLIERS:
        values = tl.where(_outliers(x, far, column, rows, columns, threshold, ROWS) > 0, 0.0, values)
    return values


@triton.jit
def round_rows(x, far, listed, codes, scales, sums, locks, inputs, rows, columns, pitch, locked, span, threshold,
               BLOCK: tl.constexpr, OUTLIERS: tl.constexpr, ROWS: tl.constexpr, STATIC: tl.constexpr,
               SUMS: tl.constexpr):
    """A row to int8 codes `[rows, pitch]`, 0 beyond its columns, with its scale and the sum of its codes.

    The first program lists the blocks with outliers, their number first, and opens the locks of the product.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    if row == 0:
        for start in range(0, locked, BLOCK):
            tl.store(locks + start + at, 0, mask=start + at < locked)
        if OUTLIERS:
            count = 0
            for start in range(0, columns, BLOCK):
                found = _outliers(x, far, start + at, rows, columns, threshold, ROWS)
                if ROWS > 0:
                    tl.store(far + start + at, found.to(tl.int8), mask=start + at < columns)
                some = tl.max(tl.reshape(found, [BLOCK // FAR, FAR]), 1)
                place = count + tl.cumsum(some, 0) - some
                tl.store(listed + 1 + place, tl.arange(0, BLOCK // FAR) + start // FAR, mask=some > 0)
                count += tl.sum(some, 0)
            tl.store(listed, count)
    if STATIC:
        scale = tl.load(inputs)
    else:
        peaks = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            values = tl.abs(_near(x, far, start + at, rows, columns, threshold, OUTLIERS, ROWS))
            peaks = tl.maximum(peaks, values, propagate_nan=tl.PropagateNan.ALL)
        peak = tl.where(tl.max((peaks != peaks).to(tl.int32), 0) > 0, float("nan"), tl.max(peaks, 0))
        scale = tl.math.div_rn(peak, span)
        tl.store(scales + row, scale)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, pitch, BLOCK):
        values = _near(x, far, start + at, rows, columns, threshold, OUTLIERS, ROWS)
        quotients = tl.math.div_rn(values, tl.zeros([BLOCK], tl.float32) + scale)
        quotients = tl.where(quotients != quotients, 0.0, quotients)
        quotients = tl.minimum(tl.maximum(quotients, -128.0), 127.0)
        # 1.5 * 2**23 leaves no bits behind the point: the sum is rounded half to even, its low bits are the code
        rounded = (quotients + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        tl.store(codes + row * pitch + start + at, rounded.to(tl.int8), mask=start + at < pitch)
        if SUMS:
            total += rounded
    if SUMS:
        tl.store(sums + row, tl.sum(total, 0))


@triton.jit
def _dot(x, codes, total):
    """A product with codes, exact but for the sums; of float32 in three parts of 8 bits, as tensor cores lack it."""
    if x.dtype == tl.float32:
        for _ in tl.static_range(3):
            part = x.to(tl.bfloat16)
            total = _dot(part, codes, total)
            x -= part.to(tl.float32)
            x = tl.where(x == x, x, 0.0)  # infinity less infinity
        return total
    if INTERPRETED:  # it has no products of bfloat16
        return tl.dot(x.to(tl.float32), codes.to(tl.float32), total)
    return tl.dot(x, codes.to(x.dtype), total)


@triton.jit
def _add_far(total, x, far, listed, w, row, out, columns, first, STEP: tl.constexpr):
    """Adds the products of outlier columns: every `STEP`-th block from `first` on."""
    for i in range(first, tl.load(listed), STEP):
        column = tl.load(listed + 1 + i) * FAR + tl.arange(0, FAR)
        there = tl.load(far + column, mask=column < columns, other=0) > 0
        values = tl.load(x + row[:, None] * columns + column[None, :], mask=there[None, :], other=0)
        codes = tl.load(w + out[None, :] * columns + column[:, None], mask=there[:, None], other=0)
        total = _dot(values, codes, total)
    return total


@triton.jit
def _scaled(sums, row_sums, zeros, scales, row, out, ZEROS: tl.constexpr, STATIC: tl.constexpr):
    if ZEROS:
        sums -= tl.load(row_sums + row)[:, None] * tl.load(zeros + out).to(tl.int32)[None, :]
    if STATIC:
        return sums.to(tl.float32) * tl.load(scales)
    return sums.to(tl.float32) * tl.load(scales + row)[:, None]


@triton.jit
def _store(total, by_row, bias, y, row, out, rows, outs, BIAS: tl.constexpr):
    total *= tl.load(by_row + out, mask=out < outs, other=0)[None, :]
    if BIAS:
        total += tl.load(bias + out, mask=out < outs, other=0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & (out < outs)[None, :]
    tl.store(y + row[:, None] * outs + out[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def multiply(codes, scales, row_sums, x, far, listed, w, by_row, zeros, bias, y, parts, far_parts, locks,
             rows, outs, columns, pitch, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
             EVEN: tl.constexpr, OUTLIERS: tl.constexpr, ZEROS: tl.constexpr, STATIC: tl.constexpr,
             BIAS: tl.constexpr):
    """A tile `[M, N]` of the product, or a part of its columns: who comes last adds up the parts, in their order."""
    tile, part = tl.program_id(0), tl.program_id(1)
    across = tl.cdiv(outs, N)
    band = tile // (BAND * across)
    high = tl.minimum(tl.cdiv(rows, M) - band * BAND, BAND)
    within = tile % (BAND * across)
    row = ((band * BAND + within % high) * M + tl.arange(0, M)).to(tl.int64)
    out = (within // high * N + tl.arange(0, N)).to(tl.int64)
    near_row, near_out = tl.minimum(row, rows - 1), tl.minimum(out, outs - 1)  # rather than masks
    k = tl.arange(0, K)
    a = codes + near_row[:, None] * pitch + k[None, :]
    b = w + near_out[None, :] * columns + k[:, None]
    sums = tl.zeros([M, N], tl.int32)
    each = tl.cdiv(pitch, K * SPLIT) * K
    for start in range(part * each, tl.minimum(part * each + each, pitch), K):
        if EVEN:
            weight = tl.load(b + start)
        else:
            weight = tl.load(b + start, mask=k[:, None] < columns - start, other=0)
        sums = tl.dot(tl.load(a + start), weight, sums)
    if SPLIT == 1:
        total = _scaled(sums, row_sums, zeros, scales, near_row, near_out, ZEROS, STATIC)
        if OUTLIERS:
            total = _add_far(total, x, far, listed, w, near_row, near_out, columns, 0, 1)
        _store(total, by_row, bias, y, row, out, rows, outs, BIAS)
    else:
        tiles = tl.num_programs(0)
        mine = tile.to(tl.int64) * (M * N) + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
        size = tiles.to(tl.int64) * (M * N)
        tl.store(parts + part * size + mine, sums)
        if OUTLIERS:
            total = _add_far(tl.zeros([M, N], tl.float32), x, far, listed, w, near_row, near_out, columns, part, SPLIT)
            tl.store(far_parts + part * size + mine, total)
        tl.debug_barrier()
        if tl.atomic_add(locks + tile, 1, sem="acq_rel") == SPLIT - 1:
            sums = tl.zeros([M, N], tl.int32)
            for i in range(SPLIT):
                sums += tl.load(parts + i * size + mine, cache_modifier=".cg")
            total = _scaled(sums, row_sums, zeros, scales, near_row, near_out, ZEROS, STATIC)
            if OUTLIERS:
                for i in range(SPLIT):
                    total += tl.load(far_parts + i * size + mine, cache_modifier=".cg")
            _store(total, by_row, bias, y, row, out, rows, outs, BIAS)


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
    x, tile, device = x.contiguous(), _tile(rows), x.device
    tiles = units(rows, tile.m) * units(outs, tile.n)
    split = _split(tiles, columns, _processors(device))
    pitch = units(columns, tile.k) * tile.k
    apart, few = outliers > 0, rows <= FEW

    def empty(*sizes: int, dtype: torch.dtype = torch.int32, where: bool = True) -> torch.Tensor:
        return torch.empty(sizes if where else 0, dtype=dtype, device=device)

    far = torch.zeros(columns if apart else 0, dtype=torch.int8, device=device)
    listed = empty(1 + units(columns, FAR.value), where=apart)
    rounded, sums = empty(rows, pitch, dtype=torch.int8), empty(rows, where=zeros is not None)
    scales = inputs if inputs is not None else empty(rows, dtype=torch.float32)
    parts, locks = empty(split, tiles, tile.m * tile.n, where=split > 1), empty(tiles, where=split > 1)
    far_parts = empty(*parts.shape, dtype=torch.float32, where=apart and split > 1)
    block = min(triton.next_power_of_2(pitch), WIDEST)
    with _current(device):
        if apart and not few:
            high, wide = LOOK
            find_outliers[units(columns, wide), units(rows, high)](x, far, rows, columns, outliers, high, wide)
        round_rows[rows,](
            x, far, listed, rounded, scales, sums, locks, scales, rows, columns, pitch, locks.numel(), span, outliers,
            BLOCK=block, OUTLIERS=apart, ROWS=triton.next_power_of_2(rows) if few else 0, STATIC=inputs is not None,
            SUMS=zeros is not None, num_warps=min(max(block // 512, 1), 16))
        multiply[tiles, split](
            rounded, scales, sums, x, far, listed, codes, by_row, codes if zeros is None else zeros,
            by_row if bias is None else bias, y, parts, far_parts, locks, rows, outs, columns, pitch,
            M=tile.m, N=tile.n, K=tile.k, SPLIT=split, EVEN=columns == pitch, OUTLIERS=apart, ZEROS=zeros is not None,
            STATIC=inputs is not None, BIAS=bias is not None, num_warps=tile.warps, num_stages=tile.stages,
            enable_fp_fusion=False)  # a bias is added after rounding, as on the CPU
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


def _tile(rows: int) -> Tile:
    return TILES[min(most for most in TILES if rows <= most)]


def _split(tiles: int, columns: int, processors: int) -> int:
    """Into how many parts columns are cut, where a product has too few tiles for the GPU."""
    wanted = min(WAVES * processors // tiles, columns // LEAST, 16)
    return 1 << max(0, wanted.bit_length() - 1)


def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return int(torch.get_device_module(device).get_device_properties(device).multi_processor_count)


def _current(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


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
