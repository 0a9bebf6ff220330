"""A decoder's plan on a GPU: steps over tensors `[tokens, width]`, recorded and run as `_native.Plan` does.

The hidden state is float32, other values have the plan's type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import numpy as np
import torch

from fewbits import _native
from fewbits.runtime.reference import Prepared
from fewbits.runtime.triton import attention, rows, steps
from fewbits.runtime.triton.attention import Tiles
from fewbits.runtime.triton.available import current
from fewbits.runtime.triton.graph import Graph
from fewbits.runtime.triton.joining import joined
from fewbits.runtime.triton.steps import Call

Array = np.ndarray

SLICE = 256  # tokens whose logits are there at a time
BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # tokens of calls that graphs are captured for
MOST_POSITIONS = 1 << 30
ROOM = 64  # positions: caches take whole lines of so many


class Plan:
    """Records the steps of a model, then runs them. Methods and arguments are those of `_native.Plan`."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, widths: Sequence[int], layers: int, heads: int,
                 kv_heads: int, head: int, scale: float):
        _require(1 <= kv_heads <= heads and heads % kv_heads == 0, "heads of queries are a multiple of those of keys")
        self.device, self.dtype, self.widths, self.layers = device, dtype, list(widths), layers
        self.heads, self.score_scale = attention.Heads(heads, kv_heads, head, dtype), scale
        self.processors, self.captures = _processors(device), device.type == "cuda"
        self._steps: list[steps.Step] = []
        self._rotations: list[tuple[torch.Tensor, float]] = []
        self._turning: dict[int, int] = {}  # buffers that `attend` will turn, and how
        self._hidden = self._state = _native.NONE  # buffers: of the hidden state; what the head takes
        self._narrowed = self._head = self._positions = 0  # steps before; rows of the table of positions
        self._spare = Cache(self, 1)  # nobody's
        self.base = self._spare.data  # what offsets count from
        self._graphs: dict[int, Graph] = {}
        self._busy = Lock()

    # recording --------------------------------------------------------------------------------------------------------
    def embed(self, table: Prepared, out: int) -> None:
        self._hidden = out
        self._steps.append(steps.Embed(table, out, rows.TOKEN))

    def positions(self, table: Prepared, out: int) -> None:
        self._positions = table.shape[0]
        self._steps.append(steps.Embed(table, out, rows.POSITION))

    def norm(self, x: int, out: int, weight: Array, epsilon: float, centred: bool = False,
             bias: Array | None = None) -> None:
        _require(self.widths[x] % len(weight) == 0, "the norm's width")
        last, added = self._steps[-1], None
        if isinstance(last, steps.Add) and last.to == x == self._hidden:
            added = last.x
            self._steps.pop()
        self._steps.append(steps.Norm(x, out, self._vector(weight), epsilon, centred,
                                None if bias is None else self._vector(bias), added))

    def multiply(self, x: int, weights: Sequence[Prepared], biases: Sequence[Array | None],
                 outs: Sequence[int]) -> None:
        for weight, out in zip(weights, outs, strict=True):
            same = weight.shape[1] == self.widths[x] and out in (_native.RESULT, _native.NONE) or \
                weight.shape == (self.widths[out], self.widths[x])
            _require(same, f"a weight of {list(weight.shape)}")
        for whole, members in joined(weights):
            widths = {outs[i]: weights[i].shape[0] for i in members}
            bias = self._bias([biases[i] for i in members], list(widths.values()))
            self._steps.append(steps.Multiply(x, whole, bias, widths))

    def rotation(self, frequencies: Sequence[float], factor: float, stretched: Sequence[float] = ()) -> int:
        _require(2 * len(frequencies) <= self.heads.width, "rotated columns of a head")
        both = [frequencies, stretched or frequencies]
        self._rotations.append((torch.tensor(both, dtype=torch.float32, device=self.device), factor))
        return len(self._rotations) - 1

    def rotate(self, x: int, rotation: int) -> None:
        self._turning[x] = rotation

    def attend(self, queries: int, keys: int, values: int, out: int, layer: int, window: int, cap: float) -> None:
        turns = {self._turning.pop(buffer, None) for buffer in (queries, keys)}
        _require(len(turns) == 1 and not self._turning, "queries and keys turn alike, just before they meet")
        self._steps.append(steps.Attend(queries, keys, values, out, layer, window, cap, turns.pop()))

    def gate(self, activation: str, gate: int, up: int, out: int) -> None:
        self._steps.append(steps.Gate(activation, gate, up, out))

    def experts(self, x: int, router: Prepared, gates: Sequence[Prepared], ups: Sequence[Prepared],
                downs: Sequence[Prepared], room: Sequence[int], out: int, chosen: int, normalised: bool,
                activation: str) -> None:
        _require(1 <= chosen <= router.shape[0], "a token goes to 1 or more of the experts")
        self._steps.append(steps.Experts(x, router, gates[0], ups[0], downs[0], out, chosen, normalised, activation))

    def scale(self, x: int, factor: float) -> None:
        self._steps.append(steps.Scaled(x, factor))

    def cap(self, x: int, most: float) -> None:
        self._steps.append(steps.Cap(x, most))

    def add(self, x: int, to: int) -> None:
        self._steps.append(steps.Add(x, to))

    def narrow(self) -> None:
        self._narrowed = len(self._steps)
        self._steps.append(steps.narrow)

    def head(self, x: int) -> None:
        self._state, self._head = x, len(self._steps)

    def type_of(self, buffer: int) -> torch.dtype:
        return torch.float32 if buffer == self._hidden else self.dtype

    def _bias(self, biases: Sequence[Array | None], widths: list[int]) -> torch.Tensor | None:
        if all(bias is None for bias in biases):
            return None
        every = [np.zeros(width, np.float32) if b is None else b for b, width in zip(biases, widths, strict=True)]
        return self._vector(np.concatenate(every), self.dtype)

    def _vector(self, values: Array, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, dtype)

    # running ----------------------------------------------------------------------------------------------------------
    def step(self, caches: Sequence[Cache], counts: Sequence[int], wanted: Sequence[int], tokens: Array, out: Array,
             states: bool, threads: int) -> None:
        with self._alone():
            chosen = _last(counts, wanted)
            if self.captures and len(tokens) <= BATCHES[-1]:
                found = self._replayed(caches, counts, tokens)[not states]
                torch.from_numpy(out).copy_(found[:len(out)] if len(out) == len(tokens) else found[chosen])
            else:
                self._launched(caches, counts, tokens, chosen, out, states)
            for cache, count in zip(caches, counts, strict=True):
                cache.length += count

    def finish(self, states: Array, out: Array, threads: int) -> None:
        with self._alone():
            self._finish(torch.from_numpy(states).to(self.device), out)

    def _finish(self, states: torch.Tensor, out: Array) -> None:
        for at in range(0, len(states), SLICE):
            torch.from_numpy(out[at:at + SLICE]).copy_(self._logits(states[at:at + SLICE]))

    def _launched(self, caches: Sequence[Cache], counts: Sequence[int], tokens: Array, chosen: Array, out: Array,
                  states: bool) -> None:
        longest = max(cache.length + count for cache, count in zip(caches, counts, strict=True))
        few = max(counts) * self.heads.group <= self.heads.few
        queries = self.heads.few if few else self.heads.queries
        spans = attention.spans(counts, queries // self.heads.group)
        numbers = torch.from_numpy(self._numbers(caches, counts, tokens, spans)).to(self.device)
        wanted = None if len(chosen) == len(tokens) else torch.from_numpy(chosen).to(self.device)
        tiles = Tiles.of(len(spans), queries, longest, self.heads, self.processors)
        call = Call(self, numbers, tiles, wanted)
        if not len(chosen):
            self._run(call, self._narrowed)
        elif states:
            torch.from_numpy(out).copy_(self._states(call))
        else:
            self._finish(self._states(call), out)

    def _replayed(self, caches: Sequence[Cache], counts: Sequence[int], tokens: Array) -> tuple[torch.Tensor, ...]:
        """States and logits of all tokens; tokens of nobody's fill up the batch of a graph."""
        size = next(size for size in BATCHES if size >= len(tokens))
        spare = size - len(tokens)
        caches, counts = [*caches, *[self._spare] * spare], [*counts, *[1] * spare]
        spans = attention.spans(counts, self.heads.few // self.heads.group)
        numbers = torch.from_numpy(self._numbers(caches, counts, np.pad(tokens, (0, spare)), spans))
        if size not in self._graphs:
            self._graphs[size] = Graph(self._after, numbers.to(self.device))
        return self._graphs[size].replay(numbers)

    def _after(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States and logits of a few tokens, whatever their sequences. A graph holds it: nothing in it may wait for the
        GPU, or depend on what the numbers are."""
        tiles = Tiles.of(numbers.shape[1], self.heads.few, MOST_POSITIONS, self.heads, self.processors)
        states = self._states(Call(self, numbers, tiles))
        return states, self._logits(states)

    def _states(self, call: Call) -> torch.Tensor:
        """What the head takes, in the rows that are wanted."""
        self._run(call, self._head)
        return call.buffers[self._state]

    def _run(self, call: Call, end: int) -> None:
        position, stretched = call.tokens[rows.POSITION], call.tokens[rows.STRETCHED]
        for frequencies, factor in self._rotations:
            angles = position.float()[:, None] * frequencies[stretched]
            call.turns.append(torch.stack([angles.cos(), angles.sin()], 1) * factor)
        for step in self._steps[:end]:
            step(call)

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        call = Call(self, states, buffers={self._state: states})
        for step in self._steps[self._head:]:
            step(call)
        return call.buffers[_native.RESULT]

    def _numbers(self, caches: Sequence[Cache], counts: Sequence[int], tokens: Array,
                 spans: list[tuple[int, int]]) -> Array:
        found, at = np.zeros((rows.ROWS, len(tokens)), np.int64), 0
        for cache, count in zip(caches, counts, strict=True):
            one = found[:, at:at + count]
            one[rows.POSITION] = np.arange(cache.length, cache.length + count)
            one[rows.OFFSET], one[rows.CAPACITY], one[rows.STRETCHED] = self._offset(cache), cache.room, cache.stretched
            at += count
        found[rows.TOKEN], found[[rows.FIRST, rows.LENGTH], :len(spans)] = tokens, np.array(spans).T
        _require(not self._positions or found[rows.POSITION].max() < self._positions,
                 "more tokens than the table has positions")
        return found

    def _offset(self, cache: Cache) -> int:
        """Values from where `base` lies."""
        return (cache.data.data_ptr() - self.base.data_ptr()) // self.dtype.itemsize

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One call at a time, on this plan's device."""
        with self._busy, torch.inference_mode(), current(self.device):
            yield

    def cache_bytes(self, capacity: int, kept: str) -> int:
        positions = -(-capacity // ROOM) * ROOM
        return self.layers * 2 * self.heads.kv_heads * positions * self.heads.width * self.dtype.itemsize


class Cache:
    """Keys and values of a sequence, `[layers, 2, heads, capacity, columns]` in the plan's type."""

    def __init__(self, plan: Plan, capacity: int):
        self.length, self.capacity, self.room, self.stretched = 0, capacity, -(-capacity // ROOM) * ROOM, False
        self.data = torch.empty(plan.layers, 2, plan.heads.kv_heads, self.room, plan.heads.width, dtype=plan.dtype,
                                device=plan.device)

    def copy(self, source: Cache, length: int) -> None:
        self.data[..., :length, :] = source.data[..., :length, :]
        self.length, self.stretched = length, source.stretched

    def truncate(self, length: int) -> None:
        self.length = length


def _last(counts: Sequence[int], wanted: Sequence[int]) -> Array:
    """Which tokens are the last `wanted` ones of their pieces."""
    ends = np.cumsum(counts)
    return np.concatenate([np.arange(end - n, end) for end, n in zip(ends, wanted, strict=True)])


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 64 if device.type == "xpu" else 4
