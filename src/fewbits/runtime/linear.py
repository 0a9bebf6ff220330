"""Linear layers and embeddings whose weight holds packed bytes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fewbits.containers.base import flat_bytes
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.runtime.dispatch import moved
from fewbits.runtime.reference import Prepared
from fewbits.runtime.unmerged import refuse_merging


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

    def _hold(self, prepared: Prepared, shown: torch.dtype | None = None) -> None:
        """Planes are held as bytes, whatever numbers they are: what casts the model to another type passes them by.
        With a type to be `shown`, see `show`."""
        for name in [name for name in self._buffers if name.startswith("plane_")]:
            del self._buffers[name]
        first, *others = prepared.planes
        self.weight = nn.Parameter(_bytes(prepared.planes[first]), requires_grad=False)
        for name in others:
            self.register_buffer(f"plane_{name}", _bytes(prepared.planes[name]))
        self.prepared = prepared
        if shown is not None:
            self.show(shown)

    def __getstate__(self) -> dict[str, Any]:
        """Without the planes, which are those of `prepared`: copies and what was pickled share them again."""
        state = vars(self).copy()
        state["_shown"] = self.weight.dtype if self.weight.is_floating_point() else None
        state["_parameters"] = {name: p for name, p in self._parameters.items() if name != "weight"}
        state["_buffers"] = {name: b for name, b in self._buffers.items() if not name.startswith("plane_")}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        shown = state.pop("_shown")
        super().__setstate__(state)
        self._hold(self.prepared, shown)

    def show(self, dtype: torch.dtype) -> None:
        """Have an empty weight of a float type, for those who look at the type of it; the codes become a buffer."""
        if not self.weight.is_floating_point():
            self.register_buffer(f"plane_{next(iter(self.prepared.planes))}", self.weight.data)
            self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=self.prepared_device), requires_grad=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What `to()` and `cuda()` call: on another device the weight is prepared anew; types are not cast."""
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.prepared_device)).device
        if device.type == "meta":
            raise FewbitsError("packed weights cannot be moved to the meta device")
        if device != self.prepared_device:
            shown = self.weight.dtype if self.weight.is_floating_point() else None
            self._hold(moved(self.prepared, device), shown)
        return super()._apply(fn, recurse)

    @property
    def prepared_device(self) -> torch.device:
        return next(iter(self.prepared.planes.values())).device

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "peft" in sys.modules:  # which asks for it before anything else
            refuse_merging(_Packed)
        return super().__getattr__(name)

    @property
    def q(self) -> QTensor:
        """The weight in its codec's layout."""
        return self.prepared.q


def _bytes(plane: torch.Tensor) -> torch.Tensor:
    return plane if plane.dtype in (torch.uint8, torch.int8) else flat_bytes(plane)


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
