"""Gradient steps that can be interrupted, and that keep the best of what they passed on text held out."""

from __future__ import annotations

import io
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fewbits.jobs.store import Store

CHECKS = 4  # times that the loss on held-out batches is measured on the way
SAVE_EVERY = 60.0  # seconds
SMOOTHING = 0.1  # of the loss that is told
WARM_UP = 0.1  # share of the steps in which the learning rate rises

Loss = Callable[[int], torch.Tensor]  # of the batch of that number


@dataclass(frozen=True)
class Outcome:
    """Mean loss on held-out batches, before and after."""

    before: float
    after: float
    steps: int


def train(parameters: list[nn.Parameter], loss: Loss, count: int, held_out: list[int], *, steps: int, rate: float,
          seed: int, store: Store, name: str, advance: Callable[[int, str], None]) -> Outcome:
    """Tune `parameters` by `steps` steps of Adam, one batch each, on the first `count` batches.

    They end as they were where the mean loss on the batches `held_out` was least: unchanged, if that was at the start.
    Each parameter's steps are relative to its own size where it has one; they rise and fall again, `rate` times the
    square root of the loss at most: what noise in the steps costs grows with their square.
    `store` keeps under `name` how far it got.
    """
    sizes = [_size(p) for p in parameters]
    adam = torch.optim.Adam([{"params": [p]} for p in parameters], betas=(0.9, 0.99))
    order = _order(count, steps, seed)

    def measured() -> float:
        with torch.no_grad():
            return statistics.fmean(float(loss(i)) for i in held_out)

    state = _restored(store.read(name), adam, parameters)
    if state is None:
        before = measured()
        state = {"step": 0, "before": before, "now": before, "least": before, "best": _copy(parameters)}
    saved = time.monotonic()
    advance(state["step"], _told(state))
    for step in range(state["step"], steps):
        value = loss(order[step])
        adam.zero_grad()
        value.backward()
        for group, size in zip(adam.param_groups, sizes, strict=True):
            group["lr"] = rate * math.sqrt(state["before"]) * size * _share(step, steps)
        adam.step()
        state |= {"step": step + 1, "recent": _smoothed(state.get("recent"), float(value.detach()))}
        if (step + 1) % math.ceil(steps / CHECKS) == 0 or step + 1 == steps:
            state["now"] = measured()
            if state["now"] < state["least"]:
                state |= {"least": state["now"], "best": _copy(parameters)}
        advance(1, _told(state))
        if time.monotonic() - saved > SAVE_EVERY:
            store.write(name, _bytes(state, adam, parameters))
            saved = time.monotonic()
    with torch.no_grad():
        for p, best in zip(parameters, state["best"], strict=True):
            p.copy_(best)
    store.write(name, _bytes(state, adam, parameters))
    return Outcome(state["before"], state["least"], steps)


def _smoothed(mean: float | None, value: float) -> float:
    return value if mean is None else mean + SMOOTHING * (value - mean)


def _told(state: dict[str, Any]) -> str:
    recent = f"{state['recent']:.4g} now, " if "recent" in state else ""
    return f"{recent}{state['now']:.4g} on held-out text, {state['before']:.4g} before"


def _size(p: nn.Parameter) -> float:
    """Root mean square; 1 for what is all zero, as factors are."""
    size = float(p.detach().square().mean().sqrt())
    return size if size > 0 else 1.0


def _share(step: int, steps: int) -> float:
    """Of the largest learning rate: up in a line, down in half a cosine."""
    rise = WARM_UP * steps
    return min((step + 1) / (rise + 1), (1 + math.cos(math.pi * max(0.0, step - rise) / (steps - rise))) / 2)


def _order(count: int, steps: int, seed: int) -> list[int]:
    """Which batch each step takes: all of them in a new order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-steps // count))]
    return torch.cat(rounds)[:steps].tolist()


def _copy(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters]


def _bytes(state: dict[str, Any], adam: Any, parameters: list[nn.Parameter]) -> bytes:
    out = io.BytesIO()
    torch.save({"state": state, "adam": adam.state_dict(), "parameters": _copy(parameters)}, out)
    return out.getvalue()


def _restored(data: bytes | None, adam: Any, parameters: list[nn.Parameter]) -> dict[str, Any] | None:
    """Where an earlier run got to."""
    if data is None:
        return None
    found = torch.load(io.BytesIO(data), weights_only=True)
    adam.load_state_dict(found["adam"])
    with torch.no_grad():
        for p, value in zip(parameters, found["parameters"], strict=True):
            p.copy_(value)
    state: dict[str, Any] = found["state"]
    return state
