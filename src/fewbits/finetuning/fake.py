"""Fake quantization: a linear layer that trains float weights, and multiplies by what a codec makes of them.

Gradients go straight through the rounding (Bengio et al., 2013, arXiv 1308.3432). Scales that are learned multiply the
decoded values, as in finishing; codes are the nearest on the grid of the parameters that were fitted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fewbits.codecs.base import Params, decode_units, encode_units, fit_units
from fewbits.finetuning.checkpoints import KEPT
from fewbits.finishing.tuned import Tuned
from fewbits.qtensor import QTensor

HALVINGS = 5  # of the way from a value to its weight, in search of the last place that is still rounded to it
EASE = 0.3  # of a weight's steps are those of scales and norms, which move many values at once
HOLD = 0.5  # of that way is gone: latent weights crowded at the edge would all change their codes at once


class Fake(Tuned):
    """Multiplies by `latent` `[out, in]` as the codec of `q` rounds it; begins at exactly the values of `q`.

    `latent` is in parts of a level, as wide as the mean error of rounding says that levels are, so that one learning
    rate suits every layer and width. It begins at the float `weight`, or, where that is not rounded to the value in
    `q`, half-way from that to the edge.
    """

    def __init__(self, q: QTensor, bias: nn.Parameter | None, weight: torch.Tensor, learn_scales: bool = True):
        super().__init__(q, bias)
        if not learn_scales:
            self.factors = nn.ParameterDict()
        weight = weight.float() if q.order is None else weight.float()[:, q.order]
        self.level = 1.0
        self.level = _size(self._values(weight) - weight) * math.sqrt(12) or _size(weight) or 1.0
        self.gain = EASE * self.level / (_size(weight) or 1.0)
        self.latent = nn.Parameter(self._nearest(weight))

    @property
    def params(self) -> Params:
        """As they were fitted, without factors; part of a training's checkpoints."""
        return {k: self.get_buffer(KEPT + k) for k in self.fitted}

    @params.setter
    def params(self, params: Params) -> None:
        self.fitted = tuple(params)
        for k, p in params.items():
            self.register_buffer(KEPT + k, p.contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.q.order is not None:
            x = x.index_select(-1, self.q.order)
        y = _Product.apply(x, self, self.latent, *self.factors.values())
        return y if self.bias is None else y + self.bias

    def scaled(self) -> Params:
        """Parameters with their factors, rounded to what files hold."""
        return {k: p.to(self.params[k].dtype) for k, p in super().scaled().items()}

    def encode(self) -> torch.Tensor:
        """Set the codes to those of the latent weights as they are now."""
        self.codes = self._codes(self.latent)
        return self.codes

    def result(self) -> QTensor:
        """What the layer multiplies by, packed."""
        self.encode()
        return super().result()

    def refit(self) -> None:
        """Parameters fitted anew to the latent weights, as the codec's own search does it."""
        w, codec = (self.latent.detach() * self.level).view(self.codes.shape), self.q.codec
        self.params = fit_units(w, codec, None, codec.begin(w, None))

    def _codes(self, latent: torch.Tensor) -> torch.Tensor:
        return encode_units((latent.detach() * self.level).view(self.codes.shape), self.q.codec, self.params)

    def _values(self, latent: torch.Tensor) -> torch.Tensor:
        return decode_units(self._codes(latent), self.q.codec, self.params).view(self.q.shape)

    def _nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """What is rounded to the values of `q`, near to `weight`."""
        value = decode_units(self.codes, self.q.codec, self.params).view(self.q.shape)

        def latent(share: torch.Tensor) -> torch.Tensor:
            return (value + share * (weight - value)) / self.level

        def fits(share: torch.Tensor) -> torch.Tensor:
            return self._values(latent(share)) == value

        whole, share = fits(torch.ones_like(value)), torch.zeros_like(value)
        for i in range(1, HALVINGS + 1):
            share = torch.where(fits(share + 0.5 ** i), share + 0.5 ** i, share)
        return latent(torch.where(whole, 1.0, HOLD * share))


def _size(x: torch.Tensor) -> float:
    """Root mean square."""
    return float(x.square().mean().sqrt())


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Fake, latent: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, layer.encode())
        return x @ layer.weight().to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        layer: Fake = ctx.layer
        (x, layer.codes), g = ctx.saved_tensors, grads[0]
        weight = layer.weight()
        grad_x = g @ weight.to(g.dtype) if ctx.needs_input_grad[0] else None
        slope = (g.flatten(0, -2).T @ x.flatten(0, -2)).float()
        slopes = layer.slopes(slope, weight) if layer.factors else []
        return grad_x, None, slope.mul_(layer.level), *slopes
