"""A linear layer on a quantized weight whose float parameters are being tuned, codes as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewbits.codecs.base import Params, decode_units, spans
from fewbits.qtensor import QTensor


class Tuned(nn.Module):
    """Multiplies by the decoded `q` `[out, in]`; every linear parameter of every unit is scaled by 1 + `gain` times its
    factor.

    Weights are decoded in each pass: between passes only codes are held.
    """

    gain = 1.0

    def __init__(self, q: QTensor, bias: nn.Parameter | None):
        super().__init__()
        self.q, self.bias = q, bias
        self.codes, self.params = q.unpack()
        self.factors = nn.ParameterDict({k: nn.Parameter(torch.zeros_like(self.params[k], dtype=torch.float32))
                                         for k in q.codec.linear})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.q.order is not None:
            x = x.index_select(-1, self.q.order)
        y = _Product.apply(x, self, *self.factors.values())
        return y if self.bias is None else y + self.bias

    def scaled(self) -> Params:
        """Parameters with their factors, before they are rounded to storage."""
        return self.params | {k: self.params[k].float() * (1 + self.gain * f.detach()) for k, f in self.factors.items()}

    def weight(self) -> torch.Tensor:
        """What codes and scaled parameters stand for, columns as they are stored."""
        return decode_units(self.codes, self.q.codec, self.scaled()).reshape(-1)[:self.size].view(self.q.shape)

    @property
    def size(self) -> int:
        return self.q.shape[-2] * self.q.shape[-1]

    def slopes(self, g: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of the factors, for the gradient `g` `[out, in]` of the `weight`.

        Values are sums of each linear parameter times what it stands for, so the last one's is what others leave.
        """
        left = self._unit_sums(g * weight)
        found = []
        for name, factor in list(self.factors.items())[:-1]:
            only = {k: torch.zeros_like(p) if k in self.factors and k != name else p for k, p in self.params.items()}
            slope = self._unit_sums(g * decode_units(self.codes, self.q.codec, only).reshape(-1)[:self.size].view_as(g))
            left -= slope * (1 + self.gain * factor)
            found.append(slope * self.gain)
        last = list(self.factors.values())[-1]
        return [*found, left * self.gain / (1 + self.gain * last)]

    def _unit_sums(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = self.codes.shape
        x = x.reshape(rows, columns)
        return torch.cat([x[:, cols].unflatten(1, (-1, width)).sum(-1, keepdim=True)
                          for cols, _, width in spans(columns, self.q.codec.unit(columns))], 1)

    def result(self) -> QTensor:
        """The tensor with its tuned parameters, rounded to what files hold."""
        stored = {k: p.to(self.params[k].dtype) for k, p in self.scaled().items()}
        planes = self.q.codec.pack(self.codes, stored, self.q.shape)
        return QTensor(self.q.codec, self.q.shape, planes, self.q.order)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Tuned, *factors: torch.Tensor) -> torch.Tensor:
        ctx.layer, weight = layer, layer.weight()
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (x, weight), g = ctx.saved_tensors, grads[0]
        grad_x = g @ weight if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return grad_x, None, *(None for _ in ctx.layer.factors)
        return grad_x, None, *ctx.layer.slopes(g.flatten(0, -2).T @ x.flatten(0, -2), weight)
