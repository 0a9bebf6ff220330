"""Products of activations with weights of few bits: of one row, and of more by matrix units.

Programs may share the columns of an output (`SPLIT`): each leaves its sums, and the last to come adds all of them up in
their order, so that results do not depend on who came when.
"""

import triton
import triton.language as tl

from fewbits.runtime.triton.reading import ONE, block, numbers, weights
from fewbits.runtime.triton.sharing import is_last


@triton.jit
def matvec(x, out, bias, words, upper, scales, second, levels, row, sums, arrived, outs, columns, stride, blocks, one,
           LEVELS: tl.constexpr, SECOND: tl.constexpr, ZERO: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr,
           GROUP: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr):
    """One row of activations, `x` `[columns]`."""
    FIELDS: tl.constexpr = 32 // LOWER
    BLOCK: tl.constexpr = 16 * FIELDS
    GROUPS: tl.constexpr = BLOCK // GROUP if GROUP < BLOCK else 1
    EACH: tl.constexpr = FIELDS // GROUPS
    part = tl.program_id(1)
    n = tl.program_id(0) * N + tl.arange(0, N)
    live = n < outs
    j = tl.arange(0, 16)
    each = tl.cdiv(blocks, SPLIT)
    total = tl.zeros([16, N], tl.float32)
    for b in range(part * each, min(part * each + each, blocks)):
        word, high = block(words, upper, b, n, live, stride, UPPER)
        for g in tl.static_range(GROUPS):
            scale, offset = numbers(scales, second, (b * BLOCK + g * GROUP) // GROUP * stride + n, live, SECOND, ZERO)
            for i in tl.static_range(EACH):
                column = b * BLOCK + 16 * (g * EACH + i) + j
                if EVEN:
                    got = tl.load(x + column).to(tl.float32)
                else:
                    got = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
                weight = weights(word, high, levels, n, live, scale, offset, g * EACH + i, one, LEVELS, LOWER, UPPER)
                total = tl.fma(got[:, None], weight, total)
    found = tl.sum(total, 0)[None, :]
    m = tl.arange(0, 1)
    if SPLIT == 1:
        _finish(found, out, bias, row, m, n, 1, outs, BIAS)
    else:
        tl.store(sums + part * outs + n[None, :], found, mask=live[None, :])
        if is_last(arrived + tl.program_id(0), SPLIT):
            _gather(out, bias, row, sums, m, n, 1, outs, BIAS, SPLIT)


@triton.jit
def tile(x, out, bias, words, upper, scales, second, levels, row, sums, arrived, order, places, rows, outs, columns,
         stride, blocks, groups, LEVELS: tl.constexpr, SECOND: tl.constexpr, ZERO: tl.constexpr, LOWER: tl.constexpr,
         UPPER: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, GROUPED: tl.constexpr,
         M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr):
    """`x` `[rows, columns]` of any number of rows, `M` of them a program.

    `GROUPED`: each row meets the matrix of its expert. `places` (int32) has for each tile of rows an expert, and where
    its rows begin and end in `order`.
    """
    FIELDS: tl.constexpr = 32 // LOWER
    BLOCK: tl.constexpr = 16 * FIELDS
    GROUPS: tl.constexpr = BLOCK // GROUP if GROUP < BLOCK else 1
    EACH: tl.constexpr = FIELDS // GROUPS
    n = tl.program_id(0) * N + tl.arange(0, N)
    live = n < outs
    part = tl.program_id(2)
    m = tl.program_id(1) * M + tl.arange(0, M)
    if GROUPED:
        expert = tl.load(places + 3 * tl.program_id(1)).to(tl.int64)
        first, end = tl.load(places + 3 * tl.program_id(1) + 1), tl.load(places + 3 * tl.program_id(1) + 2)
        if first >= end:
            return
        m = first + tl.arange(0, M)
        m = tl.load(order + m, mask=m < end, other=rows)
        words += expert * blocks * 16 * stride
        upper += expert * blocks * 16 * stride
        scales += expert * groups * stride
        second += expert * groups * stride
        row += expert * outs
        if LEVELS == "rows":
            levels += expert * outs << (LOWER + UPPER)
    j = tl.arange(0, 16)
    total = tl.zeros([M, N], tl.float32)
    each = tl.cdiv(blocks, SPLIT)
    for b in range(part * each, min(part * each + each, blocks)):
        word, high = block(words, upper, b, n, live, stride, UPPER)
        for g in tl.static_range(GROUPS):
            scale, offset = numbers(scales, second, (b * BLOCK + g * GROUP) // GROUP * stride + n, live, SECOND, ZERO)
            for i in tl.static_range(EACH):
                weight = weights(word, high, levels, n, live, scale, offset, g * EACH + i, ONE, LEVELS, LOWER, UPPER)
                column = b * BLOCK + 16 * (g * EACH + i) + j
                keep = (m < rows)[:, None] if EVEN else (m < rows)[:, None] & (column < columns)[None, :]
                got = tl.load(x + m.to(tl.int64)[:, None] * columns + column[None, :], mask=keep, other=0.0)
                total = tl.dot(got, weight.to(x.dtype.element_ty), total, input_precision="ieee")
    if SPLIT > 1:
        keep = (m < rows)[:, None] & live[None, :]
        tl.store(sums + (part * rows + m)[:, None] * outs + n[None, :], total, mask=keep)
        if is_last(arrived + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), SPLIT):
            _gather(out, bias, row, sums, m, n, rows, outs, BIAS, SPLIT)
    else:
        _finish(total, out, bias, row, m, n, rows, outs, BIAS)


@triton.jit
def _gather(out, bias, row, sums, m, n, rows, outs, BIAS: tl.constexpr, SPLIT: tl.constexpr):
    """Adds up what the programs of a tile left: `sums` `[SPLIT, rows, outs]`."""
    keep = (m < rows)[:, None] & (n < outs)[None, :]
    total = tl.zeros([m.shape[0], n.shape[0]], tl.float32)
    for part in range(SPLIT):
        at = (part * rows + m)[:, None] * outs + n[None, :]
        total += tl.load(sums + at, mask=keep, other=0.0, cache_modifier=".cg")
    _finish(total, out, bias, row, m, n, rows, outs, BIAS)


@triton.jit
def _finish(total, out, bias, row, m, n, rows, outs, BIAS: tl.constexpr):
    live = n < outs
    total = total * tl.load(row + n, mask=live, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)[None, :]
    keep = (m < rows)[:, None] & live[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * outs + n[None, :], total.to(out.dtype.element_ty), mask=keep)
