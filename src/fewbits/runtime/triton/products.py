"""Products of activations with weights of few bits: for up to four rows, and with matrix units for more.

Programs may share the columns of an output (`SPLIT`): each leaves its sums, and the last to come adds all of them up in
their order, so that results do not depend on who came when.
"""

import triton
import triton.language as tl

from fewbits.runtime.triton.reading import level, line

AT_ONCE = tl.constexpr(8)  # fields that a tile decodes at a time


@triton.jit
def matvec(x, out, bias, words, upper, scales, second, levels, row, sums, arrived, rows, outs, columns, stride, blocks,
           LEVELS: tl.constexpr, SECOND: tl.constexpr, ZERO: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr,
           GROUP: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
           SPLIT: tl.constexpr):
    """`x` `[rows, columns]` of up to `M` (1, 2 or 4) rows; every weight meets all of them once it is decoded."""
    FIELDS: tl.constexpr = 32 // LOWER
    BLOCK: tl.constexpr = 16 * FIELDS
    GROUPS: tl.constexpr = BLOCK // GROUP if GROUP < BLOCK else 1
    EACH: tl.constexpr = FIELDS // GROUPS
    tile, part = tl.program_id(0), tl.program_id(1)
    n = tile * N + tl.arange(0, N)
    live = n < outs
    j = tl.arange(0, 16)
    each = tl.cdiv(blocks, SPLIT)
    total0 = tl.zeros([16, N], tl.float32)
    total1, total2, total3 = total0, total0, total0
    for b in range(part * each, min(part * each + each, blocks)):
        at = (b * 16 + j)[:, None] * stride + n[None, :]
        word = tl.load(words + at, mask=live[None, :], other=0)
        high = word
        if UPPER > 0:
            high = tl.load(upper + at, mask=live[None, :], other=0)
        for g in tl.static_range(GROUPS):
            slope, offset = line(scales, second, (b * BLOCK + g * GROUP) // GROUP * stride + n, live, LEVELS, SECOND,
                                 ZERO, LOWER + UPPER)
            sum0 = tl.zeros([16, N], tl.float32)
            sum1, sum2, sum3 = sum0, sum0, sum0
            plain0 = tl.zeros([16], tl.float32)
            plain1, plain2, plain3 = plain0, plain0, plain0
            for i in tl.static_range(EACH):
                at_field: tl.constexpr = g * EACH + i
                value = level(word, high, levels, n[None, :], live[None, :], at_field, LEVELS, LOWER, UPPER)
                column = b * BLOCK + 16 * at_field + j
                sum0, plain0 = _add(sum0, plain0, value, x, column, 0, rows, columns, EVEN)
                if M > 1:
                    sum1, plain1 = _add(sum1, plain1, value, x, column, 1, rows, columns, EVEN)
                if M > 2:
                    sum2, plain2 = _add(sum2, plain2, value, x, column, 2, rows, columns, EVEN)
                    sum3, plain3 = _add(sum3, plain3, value, x, column, 3, rows, columns, EVEN)
            total0 += sum0 * slope[None, :] + plain0[:, None] * offset[None, :]
            if M > 1:
                total1 += sum1 * slope[None, :] + plain1[:, None] * offset[None, :]
            if M > 2:
                total2 += sum2 * slope[None, :] + plain2[:, None] * offset[None, :]
                total3 += sum3 * slope[None, :] + plain3[:, None] * offset[None, :]
    _leave(total0, out, bias, row, sums, 0, part, rows, outs, n, live, BIAS, SPLIT)
    if M > 1:
        _leave(total1, out, bias, row, sums, 1, part, rows, outs, n, live, BIAS, SPLIT)
    if M > 2:
        _leave(total2, out, bias, row, sums, 2, part, rows, outs, n, live, BIAS, SPLIT)
        _leave(total3, out, bias, row, sums, 3, part, rows, outs, n, live, BIAS, SPLIT)
    if SPLIT > 1 and _is_last(arrived + tile, SPLIT):
        _gather(out, bias, row, sums, tl.arange(0, M), n, rows, outs, BIAS, SPLIT)


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
    SOME: tl.constexpr = FIELDS if FIELDS < AT_ONCE else AT_ONCE
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
    some = tl.arange(0, SOME)
    total = tl.zeros([M, N], tl.float32)
    each = tl.cdiv(blocks, SPLIT)
    for b in range(part * each, min(part * each + each, blocks)):
        at = (b * 16 + j)[:, None] * stride + n[None, :]
        word = tl.load(words + at, mask=live[None, :], other=0)
        high = word
        if UPPER > 0:
            high = tl.load(upper + at, mask=live[None, :], other=0)
        for f in tl.static_range(0, FIELDS, SOME):
            i = f + some
            slope, offset = line(scales, second, ((b * BLOCK + 16 * i) // GROUP)[:, None, None] * stride
                                 + n[None, None, :], live[None, None, :], LEVELS, SECOND, ZERO, LOWER + UPPER)
            value = level(word[None, :, :], high[None, :, :], levels, n[None, None, :], live[None, None, :],
                          i[:, None, None], LEVELS, LOWER, UPPER) * slope
            if LEVELS == "line":
                value += offset
            weight = tl.reshape(value.to(x.dtype.element_ty), [16 * SOME, N])
            column = b * BLOCK + 16 * f + tl.arange(0, 16 * SOME)
            keep = (m < rows)[:, None] if EVEN else (m < rows)[:, None] & (column < columns)[None, :]
            got = tl.load(x + m.to(tl.int64)[:, None] * columns + column[None, :], mask=keep, other=0.0)
            total = tl.dot(got, weight, total, input_precision="ieee")
    if SPLIT > 1:
        keep = (m < rows)[:, None] & live[None, :]
        tl.store(sums + (part * rows + m)[:, None] * outs + n[None, :], total, mask=keep)
        if _is_last(arrived + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), SPLIT):
            _gather(out, bias, row, sums, m, n, rows, outs, BIAS, SPLIT)
    else:
        _finish(total, out, bias, row, m, n, rows, outs, BIAS)


@triton.jit
def _add(total, plain, value, x, column, m, rows, columns, EVEN: tl.constexpr):
    """Adds a row's products with weights of some columns, and its activations by themselves."""
    if EVEN and m == 0:
        got = tl.load(x + column).to(tl.float32)
    else:
        keep = (column < columns) & (column * 0 + m < rows)
        got = tl.load(x + m * columns + column, mask=keep, other=0.0).to(tl.float32)
    return total + value * got[:, None], plain + got


@triton.jit
def _leave(total, out, bias, row, sums, m, part, rows, outs, n, live, BIAS: tl.constexpr, SPLIT: tl.constexpr):
    """A row's results, or this program's share of them."""
    if SPLIT > 1:
        tl.store(sums + (part * rows + m) * outs + n, tl.sum(total, 0), mask=live & (n * 0 + m < rows))
    else:
        _finish(tl.sum(total, 0)[None, :], out, bias, row, m + tl.arange(0, 1), n, rows, outs, BIAS)


@triton.jit
def _is_last(arrived, SPLIT: tl.constexpr):
    """Whether all other programs of a tile have left their sums; its counter is then ready for the next launch."""
    tl.debug_barrier()
    came = tl.atomic_add(arrived, 1, sem="acq_rel")
    if came == SPLIT - 1:
        tl.store(arrived, 0)
    return came == SPLIT - 1


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
