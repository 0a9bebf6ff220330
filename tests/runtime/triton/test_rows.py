"""Norms, gates, and queries, keys and values that are turned and kept: against float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from fewbits.runtime.triton import rows

TYPES = (torch.float32, torch.float16)
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3}


def dice(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= BOUNDS[got.dtype] * want.abs().max()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width, runs", [(60, 1), (10, 6), (300, 1)])
def test_norms(dtype: torch.dtype, width: int, runs: int, device: str) -> None:
    wide = dice(3, width * runs + 7, device=device, dtype=dtype)
    x, weight, bias = wide[:, :width * runs], dice(width, device=device), dice(width, device=device) + 1
    parts = x.double().view(3, runs, width)
    want = parts * (parts.square().mean(-1, True) + 1e-5).rsqrt() * weight.double()
    near(rows.norm(x, weight, 1e-5, dtype), want.view(x.shape))
    want = F.layer_norm(parts, (width,), weight.double(), bias.double(), 1e-5)
    near(rows.norm(x, weight, 1e-5, dtype, True, bias), want.view(x.shape))


@pytest.mark.parametrize("dtype", TYPES)
def test_norms_of_sums(dtype: torch.dtype, device: str) -> None:
    """The hidden state is the sum afterwards."""
    hidden, weight = dice(3, 77, device=device), dice(77, device=device)
    added = dice(3, 90, device=device, dtype=dtype)[:, 5:82]
    total = hidden.double() + added.double()
    found = rows.norm(hidden, weight, 1e-5, dtype, added=added)
    near(hidden, total)
    near(found, total * (total.square().mean(-1, True) + 1e-5).rsqrt() * weight.double())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", rows.ACTIVATIONS)
def test_gates(activation: str, dtype: torch.dtype, device: str) -> None:
    both = 3 * dice(2, 2 * 1100, device=device, dtype=dtype)  # side by side, as a joined product leaves them
    gate, up = both[:, :1100], both[:, 1100:]
    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}
    want = act[activation](gate.double())
    near(rows.gate(activation, gate, None), want)
    near(rows.gate(activation, gate, up), want * up.double())


def numbers(caches: list[torch.Tensor], base: torch.Tensor, positions: list[list[int]],
            spans: Sequence[tuple[int, int]] = ()) -> torch.Tensor:
    """The rows of numbers of a call: some tokens of each cache `[layers, 2, heads, capacity, columns]`, and tiles."""
    found = []
    for cache, at in zip(caches, positions, strict=True):
        offset = (cache.data_ptr() - base.data_ptr()) // cache.itemsize
        found += [[0, position, offset, cache.shape[3], 0, 0, 0] for position in at]
    for row, span in zip(found, spans, strict=False):
        row[5:] = span
    return torch.tensor(found).T.contiguous().to(base.device)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("head, half", [(32, 16), (20, 5), (10, 5), (24, 0)])
def test_keys_and_values_go_where_they_belong(head: int, half: int, dtype: torch.dtype, device: str) -> None:
    heads, kv_heads, layer = 6, 2, 1
    base = torch.zeros(2, 2, kv_heads, 64, head, dtype=dtype, device=device)
    caches = [torch.full((2, 2, kv_heads, room, head), 7.0, dtype=dtype, device=device) for room in (64, 128)]
    tokens = numbers(caches, base, [[3, 4], [127]])
    wide = dice(3, (heads + 2 * kv_heads) * head, device=device, dtype=dtype)
    q, k, v = wide.split([heads * head, kv_heads * head, kv_heads * head], 1)
    turns = dice(3, 2, half, device=device) if half else None

    def turned(x: torch.Tensor) -> torch.Tensor:
        x = x.double().view(3, -1, head).clone()
        if turns is not None:
            cos, sin = turns.double().unbind(1)
            a, b = x[..., :half].clone(), x[..., half:2 * half].clone()
            x[..., :half] = a * cos[:, None] - b * sin[:, None]
            x[..., half:2 * half] = b * cos[:, None] + a * sin[:, None]
        return x

    near(rows.keep(q, k, v, turns, tokens, base, layer, head), turned(q).view(q.shape))
    for row, (cache, position) in enumerate([(caches[0], 3), (caches[0], 4), (caches[1], 127)]):
        near(cache[layer, 0, :, position], turned(k)[row])
        assert torch.equal(cache[layer, 1, :, position], v[row].view(kv_heads, head))
        cache[layer, :, :, position] = 7
    assert all((cache == 7).all() for cache in caches) and not base.any(), "nothing else was written"
