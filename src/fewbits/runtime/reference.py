"""The reference kernels: decode in torch, multiply in torch. Right for every codec on every device; slow or large."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F

from fewbits.codecs.base import Codec, Planes, Shape
from fewbits.qtensor import QTensor


class Prepared(Protocol):
    """One weight, ready to multiply."""

    @property
    def codec(self) -> Codec: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def planes(self) -> Planes:
        """What it computes from, codes first: a kernel may keep another layout than the codec's, in place of it."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows that it decodes."""

    @property
    def q(self) -> QTensor:
        """The weight in its codec's layout, made again where the kernel keeps another."""

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x` `[..., in]` times the weight transposed, plus bias: `[..., out]`."""

    def grad_input(self, g: torch.Tensor) -> torch.Tensor:
        """Gradient of the input, `[..., in]`, from that of the output, `[..., out]`."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` `[...]` of the weight: `[..., in]`."""

    def grouped(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Of a stack `[experts, out, in]`: rows of `x` `[n, in]`, each times its expert `[n]`: `[n, out]`."""


class Kernel(Protocol):
    """A way to multiply; implementations inherit what is said here."""

    name: str
    fallback: bool = False  # right everywhere, but nothing that anyone would choose on a GPU

    def supports(self, q: QTensor, device: torch.device) -> str | None:
        """Why this kernel cannot compute with `q` on `device`, or None."""

    def offers(self, device: torch.device) -> bool:
        """Whether it is to be taken there by those who do not ask for it by name."""
        return True

    def prepare(self, q: QTensor, dtype: torch.dtype) -> Prepared:
        """`q`, on the device that it will be multiplied on."""

    def nbytes(self, codec: Codec, shape: Shape, dtype: torch.dtype) -> int:
        """Memory of a prepared weight."""
        return codec.nbytes(shape)


class _Weight:
    """Products with whatever `weight()` returns."""

    def __init__(self, q: QTensor, dtype: torch.dtype):
        self.q, self.dtype = q, dtype
        self.codec, self.shape, self.planes = q.codec, q.shape, q.planes

    def weight(self) -> torch.Tensor:
        raise NotImplementedError

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.weight().to(x.dtype), None if bias is None else bias.to(x.dtype))

    def grad_input(self, g: torch.Tensor) -> torch.Tensor:
        return g @ self.weight().to(g.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight())

    def grouped(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        stack, step = self.weight().view(self.shape).to(x.dtype), 64  # rows: each gets its own copy of a weight
        parts = zip(x.split(step), experts.split(step), strict=True)
        return torch.cat([torch.bmm(stack[e], rows[:, :, None])[:, :, 0] for rows, e in parts])


class _Decode(_Weight):
    def weight(self) -> torch.Tensor:
        return self.q.dequantize(self.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        if not self.q.codec.rows_apart(self.q.shape):
            return super().rows(ids)
        return self.q.rows(ids.reshape(-1)).dequantize(self.dtype).view(*ids.shape, -1)


class _Decoded(_Weight):
    def __init__(self, q: QTensor, dtype: torch.dtype):
        super().__init__(q, dtype)
        self.decoded = q.dequantize(dtype)

    def weight(self) -> torch.Tensor:
        return self.decoded


class Decode(Kernel):
    """Decodes the weight at every product: memory of the packed weight, time of a decoding."""

    name, fallback = "decode", True
    prepared: type[_Weight] = _Decode

    def supports(self, q: QTensor, device: torch.device) -> str | None:
        return None

    def prepare(self, q: QTensor, dtype: torch.dtype) -> Prepared:
        return self.prepared(q, dtype)


class Decoded(Decode):
    """Decodes the weight once, when it is prepared: speed and memory of the unquantized model."""

    name = "decoded"
    prepared = _Decoded

    def nbytes(self, codec: Codec, shape: Shape, dtype: torch.dtype) -> int:
        return codec.nbytes(shape) + math.prod(shape) * dtype.itemsize
