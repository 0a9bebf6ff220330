"""Taps see what linear layers read, fused experts included, while a module runs.

Transformers 5 holds the experts of a layer in parameters `[experts, …]` and calls them through an interface of its own:
no hook sees an expert's inputs. While a module is tapped, such a layer runs here, expert by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fewbits.runtime.build import is_linear

Key = tuple[nn.Module, str]  # a module and the name of its parameter


@dataclass(frozen=True)
class Reading:
    """What the weight `key` read in one call: rows `x` `[rows, in]`.

    Of experts the rows lie expert after expert, `counts` of them each, and `tokens` says which row of `source` each is.
    """

    key: Key
    source: torch.Tensor  # the tensor read, as the module got it
    x: torch.Tensor
    total: int  # tokens that the module was called with
    counts: tuple[int, ...] | None = None
    tokens: torch.Tensor | None = None

    def only(self, keep: torch.Tensor) -> Reading:
        """The rows of the tokens where `keep` is true."""
        if self.tokens is None or self.counts is None:
            return replace(self, x=self.x[keep])
        rows = keep[self.tokens]
        counts = tuple(int(part.sum()) for part in rows.split(self.counts))
        return replace(self, x=self.x[rows], tokens=self.tokens[rows], counts=counts)

    def matched(self, original: Reading) -> torch.Tensor:
        """What the same weight of the original model read at the rows of this reading `[rows, in]`.

        Where the original model sent a token to other experts, their `down_proj` read nothing: the row itself stands.
        """
        if self.tokens is None or original.tokens is None:
            return original.x
        if self.key[1] != "down_proj":
            return original.source[self.tokens]
        pairs, known = self._pairs(), original._pairs()  # both ascend
        at = torch.searchsorted(known, pairs).clamp(max=max(0, len(known) - 1))
        found = known[at] == pairs if len(known) else torch.zeros_like(pairs, dtype=torch.bool)
        x = self.x.clone()
        x[found] = original.x[at[found]]
        return x

    def _pairs(self) -> torch.Tensor:
        assert self.tokens is not None and self.counts is not None
        experts = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))
        return experts.to(self.tokens.device) * (1 << 40) + self.tokens


See = Callable[[Reading], None]


@contextmanager
def tapped(module: nn.Module, see: See) -> Iterator[None]:
    """Inside, `see` is told of every read by a linear layer or by experts of `module`, in order of execution."""
    with ExitStack() as stack:
        for part in module.modules():
            if is_linear(part):
                stack.callback(part.register_forward_pre_hook(_hook(see)).remove)
            elif is_experts(part):
                part.forward = _experts_forward(part, see)
                stack.callback(delattr, part, "forward")
        yield


def is_experts(module: nn.Module) -> bool:
    """Whether Transformers calls a module through its interface of experts."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


def _hook(see: See) -> Any:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        rows = x.reshape(-1, x.shape[-1])
        see(Reading((module, "weight"), x, rows, len(rows)))
    return hook


def _experts_forward(module: Any, see: See) -> Any:
    arguments = signature(type(module).forward)
    up = "gate_up_proj" if module.has_gate else "up_proj"

    def linear(name: str, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        weight, bias = getattr(module, name), getattr(module, name + "_bias", None)
        turned = weight.transpose(-1, -2) if module.is_transposed else weight
        return torch.cat([F.linear(x, turned[i], None if bias is None else bias[i]) for i, x in enumerate(parts)])

    def forward(*args: Any, **named: Any) -> torch.Tensor:
        hidden, index, weights = list(arguments.bind(module, *args, **named).arguments.values())[1:]
        experts, order = index.reshape(-1).sort(stable=True)
        tokens = order // index.shape[-1]
        counts = tuple(torch.bincount(experts, minlength=len(module.down_proj)).tolist())
        x = hidden[tokens]
        see(Reading((module, up), hidden, x, len(hidden), counts, tokens))
        inner = linear(up, x.split(counts))
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        see(Reading((module, "down_proj"), inner, inner, len(hidden), counts, tokens))
        y = linear("down_proj", inner.split(counts))
        if module.has_post_expert_norm:
            y = module.post_expert_norm(y)
        y = y * weights.reshape(-1)[order, None]
        return torch.zeros_like(hidden).index_add_(0, tokens, y.to(hidden.dtype))

    return forward
