"""Linear layers and embeddings whose weight holds packed bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.runtime.reference import Prepared


class _Product(torch.autograd.Function):
    """Product with a frozen weight; the gradient flows to the input and the bias."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: nn.Parameter | None, prepared: Prepared) -> torch.Tensor:
        ctx.prepared = prepared
        return prepared.matmul(x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        g = grads[0]
        grad_x = ctx.prepared.grad_input(g) if ctx.needs_input_grad[0] else None
        grad_bias = g.reshape(-1, g.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None


class _Packed(nn.Module):
    """A layer whose `weight` is the plane of codes that the kernel computes from; the other planes are buffers."""

    weight: torch.Tensor
    prepared: Prepared

    def _hold(self, prepared: Prepared) -> None:
        first, *others = prepared.planes
        codes = prepared.planes[first]
        if codes.is_floating_point():  # a weight kept in 16 bits: not what the model computes in
            codes = codes.view(torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        for name in others:
            self.register_buffer(f"plane_{name}", prepared.planes[name])
        self.prepared = prepared

    def show(self, dtype: torch.dtype) -> None:
        """Have an empty weight of a float type, for those who look at the type of it; the codes become a buffer."""
        if not self.weight.is_floating_point():
            self.register_buffer(f"plane_{next(iter(self.prepared.planes))}", self.weight.data)
            self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    @property
    def q(self) -> QTensor:
        """The weight in its codec's layout."""
        return self.prepared.q


class QLinear(_Packed, nn.Linear):
    """`nn.Linear` on a quantized tensor `[out, in]`; `weight` is its plane of codes, never a decoded view."""

    def __init__(self, prepared: Prepared, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = prepared.shape[-2:]
        self._hold(prepared)
        self.register_parameter("bias", bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not input.is_floating_point():
            raise FewbitsError(f"activations of {input.dtype} for packed weights {list(self.prepared.shape)}",
                               "was this type taken from the layer's weight?")
        if not torch.is_grad_enabled():
            return self.prepared.matmul(input, self.bias)
        return _Product.apply(input, self.bias, self.prepared)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, codec={self.prepared.codec.name}"


class QEmbedding(_Packed, nn.Embedding):
    """`nn.Embedding` on a quantized tensor `[vocabulary, width]`; decodes the rows it is asked for."""

    def __init__(self, prepared: Prepared, like: nn.Embedding):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = prepared.shape
        self.padding_idx, self.max_norm, self.norm_type = like.padding_idx, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        scale = getattr(like, "scalar_embed_scale", getattr(like, "embed_scale", None))  # Gemma multiplies embeddings
        self.scale = None if scale is None else torch.tensor(float(scale))
        self._hold(prepared)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = self.prepared.rows(input)
        return rows if self.scale is None else rows * self.scale.to(rows.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, codec={self.prepared.codec.name}"


def holds_packed(module: nn.Module) -> bool:
    """Whether `packed` has a form for a module; not for attention's that multiplies by its layer's weight itself."""
    return isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def packed(prepared: Prepared, like: nn.Module) -> QLinear | QEmbedding:
    """The module that takes the place of `like`, a linear layer or an embedding."""
    if isinstance(like, nn.Embedding):
        return QEmbedding(prepared, like)
    bias = like.bias
    assert isinstance(bias, nn.Parameter | None)
    return QLinear(prepared, bias)
