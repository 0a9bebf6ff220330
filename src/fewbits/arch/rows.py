"""The row algebra: small reversible steps between a tensor as Transformers holds it and as a file holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewbits.codecs.base import Codec
from fewbits.codecs.floats import F32
from fewbits.lazy import torch
from fewbits.qtensor import QTensor


@dataclass(frozen=True)
class Op:
    """One step. `packed` says whether it commutes with packing: then codes are moved and never decoded."""

    packed: ClassVar[bool] = True

    def codec(self, codec: Codec) -> Codec:
        """The codec of the result."""
        return codec

    def apply(self, tensor: QTensor) -> QTensor:
        """From Transformers' form to the file's."""
        raise NotImplementedError

    def undo(self, tensor: QTensor) -> QTensor:
        """From the file's form to Transformers'."""
        raise NotImplementedError


@dataclass(frozen=True)
class RopePermute(Op):
    """Rows of a query or key projection from half-split rotary pairs (i, i + d/2) to neighbouring ones (2i, 2i + 1)."""

    heads: int

    def index(self, rows: int) -> torch.Tensor:
        """Which row of Transformers' tensor each row of the file is."""
        if rows % (2 * self.heads):
            raise ValueError(f"{rows} rows do not divide into {self.heads} heads of rotary pairs")
        return torch.arange(rows).view(self.heads, 2, -1).transpose(1, 2).reshape(-1)

    def apply(self, tensor: QTensor) -> QTensor:
        return tensor.rows(self.index(tensor.shape[0]))

    def undo(self, tensor: QTensor) -> QTensor:
        return tensor.rows(torch.argsort(self.index(tensor.shape[0])))


@dataclass(frozen=True)
class AddOne(Op):
    """A norm that multiplies by 1 + w: files hold the sum, in float32, rounded at 2^-24 where w is tiny."""

    packed: ClassVar[bool] = False

    def codec(self, codec: Codec) -> Codec:
        return F32

    def apply(self, tensor: QTensor) -> QTensor:
        return self._shift(tensor, 1.0)

    def undo(self, tensor: QTensor) -> QTensor:
        return self._shift(tensor, -1.0)

    def _shift(self, tensor: QTensor, by: float) -> QTensor:
        return QTensor(F32, tensor.shape, {"data": (tensor.dequantize() + by).view(F32.matrix(tensor.shape))})


Ops = tuple[Op, ...]


def apply(ops: Ops, tensor: QTensor) -> QTensor:
    for op in ops:
        tensor = op.apply(tensor)
    return tensor


def undo(ops: Ops, tensor: QTensor) -> QTensor:
    for op in reversed(ops):
        tensor = op.undo(tensor)
    return tensor


def codec(ops: Ops, codec: Codec) -> Codec:
    """The codec of what `ops` make of a tensor of `codec`."""
    for op in ops:
        codec = op.codec(codec)
    return codec
