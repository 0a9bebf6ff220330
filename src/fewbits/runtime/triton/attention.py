"""Attention of queries to the keys and values that their sequences keep, softmax in one pass.

A tile is a few neighbouring tokens of a sequence; all heads of queries that share one of keys meet its keys together.
Where tiles are few their positions are split among programs, and what each finds is joined by another kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fewbits.runtime.triton.rows import FIRST, KEYS, LENGTH, POSITION_ROW, VALUES, line

LEAST = tl.constexpr(256)  # positions that are worth a program of their own
MOST_SPLITS = 64
FIRST_ROW, LENGTH_ROW = tl.constexpr(FIRST), tl.constexpr(LENGTH)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["count", "layer", "window"])
def _attend(q, q_stride, out, stats, base, tokens, count, layer, scale, cap, window, HEADS: tl.constexpr,
            KV_HEADS: tl.constexpr, HEAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
            CAP: tl.constexpr, SPLITS: tl.constexpr):
    tile, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, length = tl.load(tokens + FIRST_ROW * count + tile), tl.load(tokens + LENGTH_ROW * count + tile)
    keys = line(base, tokens, count, first, layer, KEYS, h, KV_HEADS, HEAD)
    values = line(base, tokens, count, first, layer, VALUES, h, KV_HEADS, HEAD)
    group: tl.constexpr = HEADS // KV_HEADS
    m, d = tl.arange(0, M), tl.arange(0, D)
    row, head, alive = first + m // group, h * group + m % group, m // group < length
    position = tl.load(tokens + POSITION_ROW * count + row, alive, 0).to(tl.int32)
    query = tl.load(q + (row * q_stride + head * HEAD)[:, None] + d[None, :], alive[:, None] & (d < HEAD)[None, :], 0.0)

    begin = tl.load(tokens + POSITION_ROW * count + first).to(tl.int32)
    end = tl.where(length > 0, begin + length.to(tl.int32), 0)
    begin = tl.where(window > 0, tl.maximum(begin - window + 1, 0), 0) // N * N
    each = tl.maximum(tl.cdiv(end - begin, SPLITS), LEAST) if SPLITS > 1 else end - begin
    each = tl.cdiv(each, N) * N
    begin += split * each
    end = tl.minimum(end, begin + each)

    top, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    sums = tl.zeros([M, D], tl.float32)
    for at in range(begin, end, N):
        p = at + tl.arange(0, N)
        there = (p < end)[:, None] & (d < HEAD)[None, :]
        k = tl.load(keys + p[:, None] * HEAD + d[None, :], there, 0.0)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        if CAP:
            scores = cap - 2 * cap / (1 + tl.exp(2 / cap * scores))
        seen = (p[None, :] <= position[:, None]) & ((window == 0) | (p[None, :] > position[:, None] - window))
        scores = tl.where(seen & (p < end)[None, :], scores * LOG2E, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weights, before = tl.exp2(scores - finite[:, None]), tl.exp2(top - finite)
        v = tl.load(values + p[:, None] * HEAD + d[None, :], there, 0.0)
        total = total * before + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * before[:, None], input_precision="ieee")
        top = higher

    write = alive[:, None] & (d < HEAD)[None, :]
    if SPLITS == 1:
        at = (row * HEADS + head) * HEAD
        found = sums / tl.where(alive, total, 1.0)[:, None]
        tl.store(out + at[:, None] + d[None, :], found.to(out.dtype.element_ty), write)
    else:
        part = (row * HEADS + head) * SPLITS + split
        tl.store(stats + part * 2, top, alive)
        tl.store(stats + part * 2 + 1, total, alive)
        tl.store(out + (part * HEAD)[:, None] + d[None, :], sums, write & (total > 0)[:, None])


@triton.jit
def _join(parts, stats, out, HEAD: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, S: tl.constexpr):
    row, s, d = tl.program_id(0).to(tl.int64), tl.arange(0, S), tl.arange(0, D)
    part = row * SPLITS + s
    top, total = tl.load(stats + part * 2, s < SPLITS, float("-inf")), tl.load(stats + part * 2 + 1, s < SPLITS, 0.0)
    weight = tl.where(total > 0, tl.exp2(top - tl.max(top, 0)), 0.0)
    sums = tl.load(parts + (part * HEAD)[:, None] + d[None, :], (total > 0)[:, None] & (d < HEAD)[None, :], 0.0)
    found = tl.sum(sums * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + row * HEAD + d, found.to(out.dtype.element_ty), d < HEAD)


@dataclass(frozen=True)
class Heads:
    """What attention is like in all layers, and what a program takes of it: what fits into registers."""

    heads: int
    kv_heads: int
    width: int  # columns of one
    dtype: torch.dtype

    @property
    def group(self) -> int:
        """Heads of queries that share one of keys."""
        return self.heads // self.kv_heads

    @property
    def columns(self) -> int:
        return max(triton.next_power_of_2(self.width), 16)

    @property
    def few(self) -> int:
        """Queries of the smallest tile."""
        return max(16, triton.next_power_of_2(self.group))

    @property
    def queries(self) -> int:
        """Of a tile. Products of float32 are made without tensor cores, a thread's share of them is small."""
        most = (1 << 15 if self.dtype.itemsize < 4 else 1 << 12) // (self.columns * self.dtype.itemsize)
        return max(self.few, min(most, 128))

    @property
    def positions(self) -> int:
        """At a time."""
        return max(16, min(64, (1 << 14) // (self.columns * self.dtype.itemsize)))


@dataclass(frozen=True)
class Tiles:
    """How the tokens of a call are shared out."""

    count: int
    queries: int  # room for so many
    splits: int  # programs that share the positions of a tile

    @classmethod
    def of(cls, spans: int, queries: int, longest: int, heads: Heads, processors: int) -> Tiles:
        """So many splits as fill the GPU, where sequences are up to `longest`."""
        wanted = min(2 * processors // (spans * heads.kv_heads), -(-longest // LEAST.value), MOST_SPLITS)
        return cls(spans, queries, max(wanted, 1))


def spans(counts: Sequence[int], tokens: int) -> list[tuple[int, int]]:
    """Of tiles of up to `tokens` neighbours in pieces of so many: the first token, and how many."""
    found, row = list[tuple[int, int]](), 0
    for count in counts:
        found += [(row + at, min(tokens, count - at)) for at in range(0, count, tokens)]
        row += count
    return found


def attend(q: torch.Tensor, tokens: torch.Tensor, base: torch.Tensor, shared: Tiles, layer: int, heads: Heads,
           scale: float, window: int, cap: float) -> torch.Tensor:
    """What every query `[tokens, heads * width]` sees of its sequence: of all positions up to its own, or of a window.

    Scores are capped by `cap`, unless it is 0. `tokens` are the rows of numbers that `rows` begins with.
    """
    splits, d, rows = shared.splits, heads.columns, len(q) * heads.heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts, stats = out, out
    if splits > 1:
        parts = torch.empty(rows, splits, heads.width, dtype=torch.float32, device=q.device)
        stats = torch.empty(rows, splits, 2, dtype=torch.float32, device=q.device)
    _attend[(shared.count, heads.kv_heads, splits)](
        q, q.stride(0), parts, stats, base, tokens, tokens.shape[1], layer, scale, cap, window,
        heads.heads, heads.kv_heads, heads.width, shared.queries, heads.positions, d, cap > 0, splits,
        num_warps=8 if shared.queries * d > 8192 else 4, num_stages=2)
    if splits > 1:
        _join[(rows,)](parts, stats, out, heads.width, d, splits, triton.next_power_of_2(splits), num_warps=4)
    return out
