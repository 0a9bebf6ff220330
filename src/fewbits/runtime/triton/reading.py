"""What all kernels do with words of a layout: make weights of one of their fields."""

import triton
import triton.language as tl

ONE = tl.constexpr(0x3F800000)


@triton.jit
def field(words, i, BITS: tl.constexpr, AT: tl.constexpr):
    """Codes of field `i` of words, from bit `AT` up."""
    if i * BITS >= AT:
        return (words >> (i * BITS - AT)) & (((1 << BITS) - 1) << AT)
    else:
        return (words << (AT - i * BITS)) & (((1 << BITS) - 1) << AT)


@triton.jit
def block(words, upper, b, n, live, stride, UPPER: tl.constexpr):
    """Words `[16, N]` of block `b` of outputs `n`, and those of their upper bits, if there are such."""
    at = (b * 16 + tl.arange(0, 16))[:, None] * stride + n[None, :]
    lower = tl.load(words + at, mask=live[None, :], other=0)
    if UPPER > 0:
        return lower, tl.load(upper + at, mask=live[None, :], other=0)
    else:
        return lower, lower


@triton.jit
def numbers(scales, second, at, live, SECOND: tl.constexpr, ZERO: tl.constexpr):
    """Scale and offset, of code 0, of groups: float32; `at` are entries of their planes."""
    scale = tl.load(scales + at, mask=live, other=0.0).to(tl.float32)
    if SECOND == "zeros":
        return scale, -scale * tl.load(second + at, mask=live, other=0).to(tl.float32)
    elif SECOND == "offsets":
        return scale, tl.load(second + at, mask=live, other=0.0).to(tl.float32) - scale * ZERO
    else:
        return scale, -scale * ZERO


@triton.jit
def weights(words, upper, levels, n, live, scale, offset, i, one, LEVELS: tl.constexpr, LOWER: tl.constexpr,
            UPPER: tl.constexpr):
    """Weights of field `i` of words `[16, N]` of outputs `n`, float32, without the row's factor.

    Of a line, the byte that holds the code is moved to bits 12 to 19, once for all fields of it, and the code made part
    of the mantissa of 1: no conversion, and one multiplication that is exact where the scale has 11 bits and the zero
    point is an integer. `one` has the bits of 1.0: `ONE`, or an argument of the same value, which the compiler for
    NVIDIA's GPUs keeps in a register in place of the masks, and has an instruction less.
    """
    if LEVELS == "line":
        byte = i * LOWER // 8
        part = i * LOWER % 8
        code = (_moved(words, byte) & (((1 << LOWER) - 1) << (12 + part))) | one
        if UPPER > 0:
            code = code | field(upper.to(tl.int32), i, UPPER, 12 + part + LOWER)
        ones = 1 << (11 - part)
        value = code.to(tl.float32, bitcast=True)  # 1 + code / ones
        return tl.fma(value, (scale * ones)[None, :], (offset - scale * ones)[None, :])
    elif LEVELS == "e4m3":
        return _small_float(words, i, LOWER, 4) * (scale * 2.0 ** 120)[None, :]
    elif LEVELS == "e5m2":
        return _small_float(words, i, LOWER, 3) * (scale * 2.0 ** 112)[None, :]
    elif LEVELS == "e2m1":
        return _small_float(words, i, LOWER, 6) * (scale * 2.0 ** 126)[None, :]
    else:
        code = field(words, i, LOWER, 0)
        if UPPER > 0:
            code = code | field(upper.to(tl.int32), i, UPPER, LOWER)
        if LEVELS == "rows":
            return tl.load(levels + (n[None, :] << (LOWER + UPPER)) + code, mask=live[None, :], other=0.0)
        else:  # the table goes through shared memory, whose addresses are cheaper
            table = tl.load(levels + tl.arange(0, 1 << (LOWER + UPPER)))
            flat = tl.gather(table, tl.reshape(code, [code.shape[0] * code.shape[1]]), 0)
            return tl.reshape(flat, [code.shape[0], code.shape[1]]) * scale[None, :]


@triton.jit
def _moved(words, byte):
    """Byte number `byte` from bit 12 up, with what lies around it."""
    if byte < 2:
        return words << (12 - 8 * byte)
    else:
        return words >> (8 * byte - 12)


@triton.jit
def _small_float(words, i, BITS: tl.constexpr, MORE: tl.constexpr):
    """Floats of field `i` with `MORE` bits less of exponent than float32 has: their bits, put where float32 has them,
    are a number that is smaller by a power of two."""
    top = words << (32 - BITS - i * BITS)
    kept = (top >> MORE) & ((((1 << (BITS - 1)) - 1) << (32 - BITS - MORE)) - (1 << 31))
    return kept.to(tl.float32, bitcast=True)
