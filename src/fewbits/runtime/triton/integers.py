"""int8 weights times activations rounded to int8, on integer tensor cores; columns of outliers in floating point.

The weight stays `[out, in]` as it is stored: integer tensor cores take both operands with the summed columns adjacent,
and a transposed weight would have to be turned byte by byte on its way.
"""

import triton
import triton.language as tl

from fewbits.runtime.triton.available import interpreted
from fewbits.runtime.triton.sharing import is_last

INTERPRETED = tl.constexpr(interpreted())
FAR = tl.constexpr(32)  # columns of a block that is multiplied in floating point if it has an outlier
BAND = tl.constexpr(8)  # tiles of rows that follow each other, so that they find the weight in the second cache


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
    else:
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
def round_rows(x, far, listed, codes, scales, sums, arrived, inputs, rows, columns, pitch, counters, span, threshold,
               BLOCK: tl.constexpr, OUTLIERS: tl.constexpr, ROWS: tl.constexpr, STATIC: tl.constexpr,
               SUMS: tl.constexpr):
    """A row to int8 codes `[rows, pitch]`, 0 beyond its columns, with its scale and the sum of its codes.

    The first program lists the blocks with outliers, their number first, and resets the product's counters.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    if row == 0:
        for start in range(0, counters, BLOCK):
            tl.store(arrived + start + at, 0, mask=start + at < counters)
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
            total = _dot_16(part, codes, total)
            x -= part.to(tl.float32)
            x = tl.where(x == x, x, 0.0)  # infinity less infinity
        return total
    else:
        return _dot_16(x, codes, total)


@triton.jit
def _dot_16(x, codes, total):
    if INTERPRETED:  # it has no products of bfloat16
        return tl.dot(x.to(tl.float32), codes.to(tl.float32), total)
    else:
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
    else:
        return sums.to(tl.float32) * tl.load(scales + row)[:, None]


@triton.jit
def _store(total, by_row, bias, y, row, out, rows, outs, BIAS: tl.constexpr):
    total *= tl.load(by_row + out, mask=out < outs, other=0)[None, :]
    if BIAS:
        total += tl.load(bias + out, mask=out < outs, other=0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & (out < outs)[None, :]
    tl.store(y + row[:, None] * outs + out[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def multiply(codes, scales, row_sums, x, far, listed, w, by_row, zeros, bias, y, parts, far_parts, arrived,
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
        weight = tl.load(b + start) if EVEN else tl.load(b + start, mask=k[:, None] < columns - start, other=0)
        sums = tl.dot(tl.load(a + start), weight, sums, out_dtype=tl.int32)
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
        if is_last(arrived + tile, SPLIT):
            sums = tl.zeros([M, N], tl.int32)
            for i in range(SPLIT):
                sums += tl.load(parts + i * size + mine, cache_modifier=".cg")
            total = _scaled(sums, row_sums, zeros, scales, near_row, near_out, ZEROS, STATIC)
            if OUTLIERS:
                for i in range(SPLIT):
                    total += tl.load(far_parts + i * size + mine, cache_modifier=".cg")
            _store(total, by_row, bias, y, row, out, rows, outs, BIAS)
