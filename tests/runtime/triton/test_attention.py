"""Attention to what several sequences keep, against float64: groups, windows, caps, and positions that are split."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewbits.runtime.triton import attention
from tests.runtime.triton.test_rows import dice, numbers

LAYERS, LAYER = 2, 1


def naive(q: torch.Tensor, cache: torch.Tensor, position: int, scale: float, window: int, cap: float) -> torch.Tensor:
    """A token's queries `[heads, head]` and all positions up to its own."""
    first = max(0, position - window + 1) if window else 0
    keys, values = cache[LAYER, :, :, first:position + 1].double()
    group = len(q) // len(keys)
    scores = torch.einsum("hgc,hpc->hgp", q.double().view(len(keys), group, -1), keys) * scale
    if cap:
        scores = cap * (scores / cap).tanh()
    return torch.einsum("hgp,hpc->hgc", scores.softmax(-1), values).reshape(q.shape)


CASES: dict[str, dict[str, Any]] = {
    "prompt": dict(before=[0], counts=[70]),
    "grouped": dict(before=[5, 0], counts=[30, 9], heads=6, kv_heads=2, head=10),
    "many to one": dict(before=[3], counts=[5], heads=20, kv_heads=1, head=16),
    "wide": dict(before=[100], counts=[7], heads=4, kv_heads=2, head=80, cap=3.0),
    "window": dict(before=[90, 2], counts=[40, 3], window=37),
    "window of one": dict(before=[9], counts=[2], window=1),
    "capped": dict(before=[20], counts=[20], cap=0.5),
    "decoding": dict(before=[700, 3, 300, 0], counts=[1, 1, 1, 1], processors=64),
    "decoding in windows": dict(before=[700, 3], counts=[1, 1], window=600, processors=16),
    "checking guesses": dict(before=[600, 40], counts=[4, 2], heads=6, kv_heads=2, processors=64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_attention(name: str, dtype: torch.dtype, device: str) -> None:
    case = dict(heads=4, kv_heads=2, head=32, window=0, cap=0.0, processors=1) | CASES[name]
    heads, kv_heads, head, window, cap = (case[k] for k in ("heads", "kv_heads", "head", "window", "cap"))
    ends = [before + count for before, count in zip(case["before"], case["counts"], strict=True)]
    caches = [torch.full((LAYERS, 2, kv_heads, 64 * -(-end // 64), head), float("nan"), dtype=dtype, device=device)
              for end in ends]
    for cache, end in zip(caches, ends, strict=True):  # what no token has filled may be anything
        cache[LAYER, :, :, :end] = dice(2, kv_heads, end, head, device=device)
    positions = [list(range(end - count, end)) for end, count in zip(ends, case["counts"], strict=True)]
    base = torch.empty(64, dtype=dtype, device=device)
    q = dice(sum(case["counts"]), heads * head, device=device, dtype=dtype)
    shape = attention.Heads(heads, kv_heads, head, dtype)
    few = max(case["counts"]) * shape.group <= shape.few
    queries = shape.few if few else shape.queries
    spans = attention.spans(case["counts"], queries // shape.group)
    tiles = attention.Tiles.of(len(spans), queries, max(ends), shape, case["processors"])
    assert (tiles.splits > 1) == (case["processors"] > 1)
    told = numbers(caches, base, positions, spans)
    got = attention.attend(q, told, base, tiles, LAYER, shape, head ** -0.5, window, cap)
    each = [(cache, position) for cache, at in zip(caches, positions, strict=True) for position in at]
    want = torch.stack([naive(row.view(heads, head), cache, position, head ** -0.5, window, cap).view(-1)
                        for row, (cache, position) in zip(q, each, strict=True)])
    assert (got.double() - want).abs().max() <= {torch.float32: 2e-6, torch.float16: 2e-3}[dtype] * want.abs().max()


def test_tiles() -> None:
    """A tile lies in one piece; positions are split where tiles are few and contexts are long."""
    assert attention.spans([70, 3], 32) == [(0, 32), (32, 32), (64, 6), (70, 3)]
    usual = attention.Heads(32, 8, 128, torch.float16)
    assert usual.few == 16 and attention.Heads(71, 1, 64, torch.float16).few == 128
    assert [attention.Tiles.of(n, 16, 5000, usual, 132).splits for n in (1, 2, 32, 64)] == [20, 16, 1, 1]
    assert attention.Tiles.of(1, 16, 200, usual, 132).splits == 1
    sizes = {(256, torch.bfloat16): (256, 64, 32), (80, torch.float16): (128, 128, 64),
             (80, torch.float32): (128, 16, 32), (10, torch.float32): (16, 64, 64)}
    for (width, dtype), want in sizes.items():
        shape = attention.Heads(8, 4, width, dtype)
        assert (shape.columns, shape.queries, shape.positions) == want
