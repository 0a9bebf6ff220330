"""What all kernels do with words of a layout: levels of their codes, and the line that makes weights of levels."""

import triton
import triton.language as tl


@triton.jit
def field(words, i, BITS: tl.constexpr, AT: tl.constexpr):
    """Codes of field `i` of words, from bit `AT` up. A field that is known when compiling costs one shift."""
    if isinstance(i, tl.constexpr):
        shift: tl.constexpr = i * BITS - AT
        if shift >= 0:
            return (words >> shift) & (((1 << BITS) - 1) << AT)
        else:
            return (words << -shift) & (((1 << BITS) - 1) << AT)
    else:
        return ((words >> (i * BITS)) & ((1 << BITS) - 1)) << AT


@triton.jit
def level(words, upper, levels, n, live, i, LEVELS: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """Levels of field `i` of words of outputs `n`, float32. Of a line it is 1 + code / 2^bits: the code is put into the
    mantissa of 1, which spares a conversion."""
    BITS: tl.constexpr = LOWER + UPPER
    if LEVELS == "line":
        code = field(words, i, LOWER, 23 - BITS) | 0x3F800000
        if UPPER > 0:
            code = code | field(upper.to(tl.int32), i, UPPER, 23 - UPPER)
        return code.to(tl.float32, bitcast=True)
    elif LEVELS == "e4m3":
        code = field(words, i, LOWER, 0)
        half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)  # float16's exponent is 8 larger
        value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((code & 0x7F) == 0x7F, float("nan"), value)
    elif LEVELS == "e5m2":
        return field(words, i, LOWER, 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        code = field(words, i, LOWER, 0)
        if UPPER > 0:
            code = code | field(upper.to(tl.int32), i, UPPER, LOWER)
        if LEVELS == "table":
            return tl.load(levels + code)
        else:
            return tl.load(levels + (n << BITS) + code, mask=live, other=0.0)


@triton.jit
def line(scales, second, at, live, LEVELS: tl.constexpr, SECOND: tl.constexpr, ZERO: tl.constexpr,
         BITS: tl.constexpr):
    """Slope and offset, float32, with which a `level` becomes a weight; `at` are entries of the planes."""
    scale = tl.load(scales + at, mask=live, other=0.0).to(tl.float32)
    if LEVELS != "line":
        return scale, scale * 0.0
    if SECOND == "zeros":
        zero = tl.load(second + at, mask=live, other=0).to(tl.float32)
        return scale * (1 << BITS), -scale * (zero + (1 << BITS))
    elif SECOND == "offsets":
        offset = tl.load(second + at, mask=live, other=0.0).to(tl.float32)
        return scale * (1 << BITS), offset - scale * (ZERO + (1 << BITS))
    else:
        return scale * (1 << BITS), -scale * (ZERO + (1 << BITS))
