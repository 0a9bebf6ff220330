"""peft's LoRA layers in fewer passes over memory: what the adapter adds goes straight into the base layer's product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import nn

from fewbits.runtime.linear import QLinear


def fuse(model: nn.Module) -> None:
    """Let the plain LoRA layers of a model compute so."""
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = _Linear


class _Linear(lora.Linear):
    """The same layer with the same parameters; anything out of the ordinary is left to peft."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self._plain(x) if not args and not kwargs else None
        if name is None:
            return super().forward(x, *args, **kwargs)
        added: torch.Tensor = _Added.apply(x, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name],
                                           self.base_layer)
        return added

    def _plain(self, x: torch.Tensor) -> str | None:
        """The one adapter that is added, with nothing else to it."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or self.disable_adapters or self.merged or self.lora_variant or self.fan_in_fan_out:
            return None
        name, base = active[0], self.base_layer
        a = self.lora_A[name]
        drops = self.training and getattr(self.lora_dropout[name], "p", 0) != 0
        known = type(base) in (nn.Linear, QLinear) and not any(p.requires_grad for p in base.parameters())
        return name if known and not drops and a.weight.dtype == x.dtype and a.bias is None else None


class _Added(torch.autograd.Function):
    """base(x) + scale * b @ a @ x, of a frozen base; a is `[rank, in]`, b `[out, rank]`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float,
                base: nn.Linear) -> torch.Tensor:
        product = base.prepared.matmul(x, base.bias) if isinstance(base, QLinear) else F.linear(
            x, base.weight, base.bias)
        inner = x.reshape(-1, x.shape[-1]) @ a.T  # [n, rank]
        product.view(-1, product.shape[-1]).addmm_(inner, b.T, alpha=scale)
        ctx.scale, ctx.base = scale, base
        ctx.save_for_backward(x, inner, a, b)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, inner, a, b = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])
        grad_b = g.T @ (inner * ctx.scale)
        grad_inner = (g @ b).mul_(ctx.scale)
        grad_a = grad_inner.T @ x.reshape(-1, x.shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            base = ctx.base
            flat = base.prepared.grad_input(g) if isinstance(base, QLinear) else g @ base.weight
            grad_x = flat.addmm_(grad_inner, a).view_as(x)
        return grad_x, grad_a, grad_b, None, None
