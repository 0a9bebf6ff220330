"""The steps of a decoder's plan on a GPU. A buffer is whatever tensor `[tokens, width]` the last step put there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from fewbits import _native
from fewbits.runtime.reference import Prepared
from fewbits.runtime.triton import attention, rows

if TYPE_CHECKING:
    from fewbits.runtime.triton.plan import Plan

Step = Callable[["Call"], None]


@dataclass
class Call:
    """What the steps work on."""

    plan: Plan
    tokens: torch.Tensor  # the numbers that `rows` begins with, one row of each
    tiles: attention.Tiles | None = None
    wanted: torch.Tensor | None = None  # tokens whose results are; None: all
    buffers: dict[int, torch.Tensor] = field(default_factory=dict)
    turns: list[torch.Tensor] = field(default_factory=list)  # by rotation


@dataclass(frozen=True)
class Embed:
    table: Prepared
    out: int
    numbers: int  # which row of the tokens' numbers

    def __call__(self, call: Call) -> None:
        call.buffers[self.out] = self.table.rows(call.tokens[self.numbers]).to(call.plan.type_of(self.out))


@dataclass(frozen=True)
class Norm:
    x: int
    out: int
    weight: torch.Tensor
    epsilon: float
    centred: bool
    bias: torch.Tensor | None
    added: int | None = None  # a buffer that is added to x first

    def __call__(self, call: Call) -> None:
        added = None if self.added is None else call.buffers[self.added]
        call.buffers[self.out] = rows.norm(call.buffers[self.x], self.weight, self.epsilon, call.plan.type_of(self.out),
                                           self.centred, self.bias, added)


@dataclass(frozen=True)
class Multiply:
    x: int
    weight: Prepared
    bias: torch.Tensor | None
    outs: dict[int, int]  # buffers, and how many columns of the product each gets

    def __call__(self, call: Call) -> None:
        found = self.weight.matmul(call.buffers[self.x].to(call.plan.dtype), self.bias)
        call.buffers.update(zip(self.outs, found.split(list(self.outs.values()), 1), strict=True))


@dataclass(frozen=True)
class Attend:
    queries: int
    keys: int
    values: int
    out: int
    layer: int
    window: int
    cap: float
    rotation: int | None

    def __call__(self, call: Call) -> None:
        plan, at = call.plan, call.buffers
        assert call.tiles is not None
        turns = None if self.rotation is None else call.turns[self.rotation]
        q = rows.keep(at[self.queries], at[self.keys], at[self.values], turns, call.tokens, plan.base, self.layer,
                      plan.heads.width)
        at[self.out] = attention.attend(q, call.tokens, plan.base, call.tiles, self.layer, plan.heads,
                                        plan.score_scale, self.window, self.cap)


@dataclass(frozen=True)
class Gate:
    activation: str
    gate: int
    up: int
    out: int

    def __call__(self, call: Call) -> None:
        up = None if self.up == _native.NONE else call.buffers[self.up]
        call.buffers[self.out] = rows.gate(self.activation, call.buffers[self.gate], up)


@dataclass(frozen=True)
class Experts:
    x: int
    router: Prepared
    gates: Prepared  # stacks [experts, out, in]
    ups: Prepared
    downs: Prepared
    out: int
    chosen: int
    normalised: bool
    activation: str

    def __call__(self, call: Call) -> None:
        x = call.buffers[self.x].to(call.plan.dtype)
        scores = self.router.matmul(x, None).float()
        best, experts = scores.topk(self.chosen)
        weights = best.softmax(-1) if self.normalised else scores.softmax(-1).gather(-1, experts)
        experts, each = experts.flatten(), x.repeat_interleave(self.chosen, 0, output_size=len(x) * self.chosen)
        inner = rows.gate(self.activation, self.gates.grouped(each, experts), self.ups.grouped(each, experts))
        found = self.downs.grouped(inner, experts).view(*weights.shape, -1)
        call.buffers[self.out] = (found * weights[..., None]).sum(1).to(call.plan.dtype)


@dataclass(frozen=True)
class Scaled:
    buffer: int
    factor: float

    def __call__(self, call: Call) -> None:
        call.buffers[self.buffer].mul_(self.factor)


@dataclass(frozen=True)
class Cap:
    buffer: int
    most: float

    def __call__(self, call: Call) -> None:
        call.buffers[self.buffer].div_(self.most).tanh_().mul_(self.most)


@dataclass(frozen=True)
class Add:
    x: int
    to: int

    def __call__(self, call: Call) -> None:
        call.buffers[self.to].add_(call.buffers[self.x])


def narrow(call: Call) -> None:
    if call.wanted is not None:
        for number, values in call.buffers.items():
            call.buffers[number] = values.index_select(0, call.wanted)
