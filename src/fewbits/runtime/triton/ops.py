"""The products as operators of torch: `torch.compile` takes them as they are, gradients flow to activations and bias.

A weight is a list of planes, and a line of text that says how to read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from functools import lru_cache
from typing import Any

import torch

from fewbits.runtime.triton.layout import Layout
from fewbits.runtime.triton.weight import Weight

Tensors = Sequence[torch.Tensor]


def spelled(weight: Weight) -> str:
    """How planes are read: the layout, the shape, their names."""
    return "|".join([",".join(map(str, astuple(weight.layout))), ",".join(map(str, weight.shape)),
                     ",".join(weight.planes)])


@lru_cache(maxsize=4096)
def _read(spelling: str) -> tuple[Layout, tuple[int, ...], tuple[str, ...]]:
    layout, shape, names = spelling.split("|")
    bits, group, levels, zero, second = layout.split(",")
    return (Layout(int(bits), int(group), levels, float(zero), second), tuple(map(int, shape.split(","))),
            tuple(names.split(",")))


def _weight(planes: Tensors, spelling: str) -> Weight:
    layout, shape, names = _read(spelling)
    return Weight(layout, shape, dict(zip(names, planes, strict=True)))


@torch.library.custom_op("fewbits::product", mutates_args=())
def product(x: torch.Tensor, planes: Tensors, bias: torch.Tensor | None, spelling: str) -> torch.Tensor:
    """`x` `[..., in]` times the transposed weight, plus bias: `[..., out]`."""
    found = _weight(planes, spelling).multiply(x.reshape(-1, x.shape[-1]).contiguous(), bias)
    return found.view(*x.shape[:-1], found.shape[-1])


@product.register_fake
def _(x: torch.Tensor, planes: Tensors, bias: torch.Tensor | None, spelling: str) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], _read(spelling)[1][-2])


@torch.library.custom_op("fewbits::product_gradient", mutates_args=())
def product_gradient(g: torch.Tensor, planes: Tensors, spelling: str) -> torch.Tensor:
    """The gradient of `product`'s `x` from that of its result."""
    found = _weight(planes, spelling).gradient(g.reshape(-1, g.shape[-1]).contiguous())
    return found.view(*g.shape[:-1], found.shape[-1])


@product_gradient.register_fake
def _(g: torch.Tensor, planes: Tensors, spelling: str) -> torch.Tensor:
    return g.new_empty(*g.shape[:-1], _read(spelling)[1][-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, planes, bias, ctx.spelling = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(*planes)


def _backward(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad
    found = product_gradient(g, list(ctx.saved_tensors), ctx.spelling) if wanted[0] else None
    bias = g.reshape(-1, g.shape[-1]).sum(0) if ctx.biased and wanted[2] else None
    return found, [None] * len(ctx.saved_tensors), bias, None


product.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("fewbits::grouped", mutates_args=())
def grouped(x: torch.Tensor, experts: torch.Tensor, planes: Tensors, spelling: str) -> torch.Tensor:
    """Every row of `x` `[n, in]` times the matrix of its expert: `[n, out]`."""
    return _weight(planes, spelling).grouped(x.contiguous(), experts)


@grouped.register_fake
def _(x: torch.Tensor, experts: torch.Tensor, planes: Tensors, spelling: str) -> torch.Tensor:
    return x.new_empty(len(x), _read(spelling)[1][-2])


@torch.library.custom_op("fewbits::rows", mutates_args=())
def rows(ids: torch.Tensor, planes: Tensors, spelling: str, dtype: torch.dtype) -> torch.Tensor:
    """Rows `ids` `[...]` of the weight: `[..., in]`."""
    weight = _weight(planes, spelling)
    return weight.rows(ids.reshape(-1), dtype).view(*ids.shape, weight.shape[-1])


@rows.register_fake
def _(ids: torch.Tensor, planes: Tensors, spelling: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*ids.shape, _read(spelling)[1][-1], dtype=dtype, device=ids.device)
