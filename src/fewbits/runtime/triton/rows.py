"""What a decoder does to rows between products: norms, gates, turning queries and keys and keeping keys and values.

Rows may lie apart (`stride`), so that parts of a joined product are used where they lie. Sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# what a call is told, int64 [ROWS, tokens]: of every token; of every tile of attention, where there are fewer 0
TOKEN, POSITION, OFFSET, CAPACITY, STRETCHED = range(5)
FIRST, LENGTH = 5, 6
ROWS = 7
OFFSET_ROW, CAPACITY_ROW, POSITION_ROW = tl.constexpr(OFFSET), tl.constexpr(CAPACITY), tl.constexpr(POSITION)

KEYS, VALUES = tl.constexpr(0), tl.constexpr(1)  # in a cache [layers, 2, heads of keys, capacity, columns]
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
SILU, GELU, GELU_TANH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _norm(x, stride, out, out_stride, added, added_stride, weight, bias, epsilon, WIDTH: tl.constexpr,
          BLOCK: tl.constexpr, CENTRED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, at = c < WIDTH, tl.program_id(1) * WIDTH + c
    v = tl.load(x + row * stride + at, inside, 0.0).to(tl.float32)
    if ADD:
        v += tl.load(added + row * added_stride + at, inside, 0.0).to(tl.float32)
        tl.store(x + row * stride + at, v, inside)
    if CENTRED:
        v = tl.where(inside, v - tl.sum(v, 0) / WIDTH, 0.0)
    v *= 1 / tl.sqrt(tl.sum(v * v, 0) / WIDTH + epsilon)
    v *= tl.load(weight + c, inside, 0.0)
    if BIAS:
        v += tl.load(bias + c, inside, 0.0)
    tl.store(out + row * out_stride + at, v.to(out.dtype.element_ty), inside)


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype, centred: bool = False,
         bias: torch.Tensor | None = None, added: torch.Tensor | None = None) -> torch.Tensor:
    """The norm in `dtype` of every run of columns as wide as `weight`; of x + `added`, which x then holds, if given.

    Root mean square, or, `centred`, LayerNorm.
    """
    rows, columns = x.shape
    width, out = len(weight), torch.empty(rows, columns, dtype=dtype, device=x.device)
    assert added is None or x.dtype == torch.float32
    block, other = triton.next_power_of_2(width), x if added is None else added
    _norm[(rows, columns // width)](
        x, x.stride(0), out, out.stride(0), other, other.stride(0), weight, weight if bias is None else bias, epsilon,
        width, block, centred, bias is not None, added is not None, num_warps=min(max(block // 256, 1), 16))
    return out


@triton.jit
def _gate(gate, stride, up, up_stride, out, width, BLOCK: tl.constexpr, ACT: tl.constexpr, UP: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    x = tl.load(gate + row * stride + c, inside, 0.0).to(tl.float32)
    if ACT == SILU:
        y = x / (1 + tl.exp(-x))
    elif ACT == GELU:
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == GELU_TANH:
        y = x / (1 + tl.exp(-1.5957691216057308 * x * (1 + 0.044715 * x * x)))
    else:
        y = tl.where(x < 0, 0.0, x)
    if UP:
        y *= tl.load(up + row * up_stride + c, inside, 0.0).to(tl.float32)
    tl.store(out + row * width + c, y.to(out.dtype.element_ty), inside)


def gate(activation: str, x: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """act(x) times `up`, or alone: rows side by side."""
    (rows, width), block = x.shape, 1024
    out, other = torch.empty(rows, width, dtype=x.dtype, device=x.device), x if up is None else up
    _gate[(rows, triton.cdiv(width, block))](x, x.stride(0), other, other.stride(0), out, width, block,
                                             ACTIVATIONS.index(activation), up is not None)
    return out


@triton.jit
def line(base, tokens, count, row, layer, kind, head, HEADS: tl.constexpr, HEAD: tl.constexpr):
    """Where the columns of position 0 of a head (or of several) begin, in the cache of a token's sequence.

    Offsets, not addresses: of those that become pointers the compiler forgets what divides them, and loads 16 bits at
    a time.
    """
    capacity = tl.multiple_of(tl.load(tokens + CAPACITY_ROW * count + row), 64)
    offset = tl.multiple_of(tl.load(tokens + OFFSET_ROW * count + row), 16)
    return base + (offset + ((layer * 2 + kind) * HEADS + head) * capacity * HEAD)



@triton.jit
def _turned(x, out, heads, turn, HEAD: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Heads, a pointer to each: pairs of columns i, i + HALF turned, those after them as they are."""
    i, x, out = tl.arange(0, BLOCK)[None, :], x[:, None], out[:, None]
    if HALF > 0:
        pair = (i < HALF) & heads[:, None]
        a, b = tl.load(x + i, pair, 0.0).to(tl.float32), tl.load(x + HALF + i, pair, 0.0).to(tl.float32)
        cos, sin = tl.load(turn + i, i < HALF, 0.0), tl.load(turn + HALF + i, i < HALF, 0.0)
        tl.store(out + i, (a * cos - b * sin).to(out.dtype.element_ty), pair)
        tl.store(out + HALF + i, (b * cos + a * sin).to(out.dtype.element_ty), pair)
    if HEAD > 2 * HALF:
        rest = (i < HEAD - 2 * HALF) & heads[:, None]
        tl.store(out + 2 * HALF + i, tl.load(x + 2 * HALF + i, rest, 0.0), rest)


@triton.jit(do_not_specialize=["count", "layer"])
def _keep(q, q_stride, k, k_stride, v, v_stride, out, base, turns, tokens, count, layer, HEADS: tl.constexpr,
          KV_HEADS: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr, H: tl.constexpr, KV: tl.constexpr,
          BLOCK: tl.constexpr, REST: tl.constexpr):
    row, what = tl.program_id(0).to(tl.int64), tl.program_id(1)
    turn = turns + row * 2 * HALF
    at = tl.load(tokens + POSITION_ROW * count + row) * HEAD
    h, kv = tl.arange(0, H), tl.arange(0, KV)
    if what == 0:
        kept = line(base, tokens, count, row, layer, KEYS, kv, KV_HEADS, HEAD) + at
        _turned(k + row * k_stride + kv * HEAD, kept, kv < KV_HEADS, turn, HEAD, HALF, BLOCK)
    elif what == 1:
        kept = line(base, tokens, count, row, layer, VALUES, kv, KV_HEADS, HEAD) + at
        _turned(v + row * v_stride + kv * HEAD, kept, kv < KV_HEADS, turn, HEAD, 0, REST)
    else:
        _turned(q + row * q_stride + h * HEAD, out + row * HEADS * HEAD + h * HEAD, h < HEADS, turn, HEAD, HALF, BLOCK)


def keep(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: torch.Tensor | None, tokens: torch.Tensor,
         base: torch.Tensor, layer: int, head: int) -> torch.Tensor:
    """Puts keys and values `[tokens, heads * head]` into the caches of their sequences; the queries.

    Queries and keys are turned by `turns` `[tokens, cosines and sines, half]`, if there are any. `tokens` are the rows
    of numbers that this module begins with, offsets from `base`.
    """
    heads, kv_heads, half = q.shape[1] // head, k.shape[1] // head, 0 if turns is None else turns.shape[-1]
    out = q if turns is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    power = triton.next_power_of_2
    _keep[(len(q), 2 if turns is None else 3)](
        q, q.stride(0), k, k.stride(0), v, v.stride(0), out, base, q if turns is None else turns, tokens,
        tokens.shape[1], layer, heads, kv_heads, head, half, power(heads), power(kv_heads),
        power(max(half, head - 2 * half)), power(head), num_warps=4)
    return out
