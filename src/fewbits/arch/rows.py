"""The row algebra: small reversible steps between a tensor as Transformers holds it and as a file holds it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fewbits.codecs.base import Codec, Shape
from fewbits.codecs.floats import F32, Float
from fewbits.lazy import torch
from fewbits.qtensor import QTensor


@dataclass(frozen=True)
class Op:
    """One step. `packed` says whether it commutes with packing: then codes are moved and never decoded."""

    packed: ClassVar[bool] = True

    def codec(self, codec: Codec) -> Codec:
        """The codec of the result."""
        return codec

    def shape(self, shape: Shape) -> Shape:
        """The shape of the result."""
        return shape

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
class Regroup(Op):
    """Rows of a fused projection from head by head (q0 k0 v0 q1 ...) to part by part (q0 q1 ... k0 k1 ... v0 ...)."""

    heads: int
    parts: int

    def index(self, rows: int) -> torch.Tensor:
        """Which row of Transformers' tensor each row of the file is."""
        if rows % (self.parts * self.heads):
            raise ValueError(f"{rows} rows do not divide into {self.heads} heads of {self.parts} parts")
        return torch.arange(rows).view(self.heads, self.parts, -1).transpose(0, 1).reshape(-1)

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


@dataclass(frozen=True)
class Every(Op):
    """Every `count`-th row from `first` on: the part of a tensor whose parts lie in turns. `join` undoes it.

    The rows are those of each expert's matrix (axis -2), or the entries of its bias (axis -1, floats only).
    """

    first: int
    count: int
    axis: int

    def shape(self, shape: Shape) -> Shape:
        if shape[self.axis] % self.count:
            raise ValueError(f"{shape[self.axis]} rows do not divide into {self.count} parts")
        sides = list(shape)
        sides[self.axis] //= self.count
        return tuple(sides)

    def whole(self, shape: Shape) -> Shape:
        """The shape of the tensor whose parts have this one."""
        sides = list(shape)
        sides[self.axis] *= self.count
        return tuple(sides)

    def apply(self, tensor: QTensor) -> QTensor:
        shape = self.shape(tensor.shape)
        planes = {}
        for key, plane in tensor.planes.items():
            picked = self._rows(tensor, plane)[:, self.first::self.count]
            planes[key] = picked.reshape(tensor.codec.planes(shape)[key][1])
        return QTensor(tensor.codec, shape, planes)

    def _rows(self, tensor: QTensor, plane: torch.Tensor) -> torch.Tensor:
        """A plane as `[matrices, rows, what a row takes]`."""
        if self.axis == -1 and not isinstance(tensor.codec, Float) or not tensor.codec.rows_apart(tensor.shape):
            raise ValueError(f"parts of {tensor.codec.name} {list(tensor.shape)} cannot be taken without decoding")
        outer = tensor.shape[:self.axis]
        return plane.reshape(math.prod(outer), tensor.shape[self.axis], -1)

    def join(self, parts: list[QTensor]) -> QTensor:
        """The tensor whose parts these are, in order."""
        first = parts[0]
        if any(p.codec != first.codec or p.shape != first.shape for p in parts) or len(parts) != self.count:
            raise ValueError("its parts differ in type or shape")
        shape, planes = self.whole(first.shape), {}
        for key in first.planes:
            turns = torch.stack([self._rows(p, p.planes[key]) for p in parts], 2)
            planes[key] = turns.reshape(first.codec.planes(shape)[key][1])
        return QTensor(first.codec, shape, planes)


Ops = tuple[Op, ...]


def apply(ops: Ops, tensor: QTensor) -> QTensor:
    for op in ops:
        tensor = op.apply(tensor)
    return tensor


def undo(ops: Ops, tensor: QTensor) -> QTensor:
    for op in reversed(ops):
        tensor = op.undo(tensor)
    return tensor


def join(parts: list[tuple[Ops, QTensor]]) -> QTensor:
    """One tensor of those that several rows of a table make of it, each with `Every` as its first operation.

    Raises:
        ValueError: parts that do not fit together.
    """
    found = {}
    for ops, tensor in parts:
        op = ops[0]
        assert isinstance(op, Every), op
        found[op.first] = op, undo(ops[1:], tensor)
    return found[0][0].join([found[i][1] for i in sorted(found)])


def whole(ops: Ops, shape: Shape) -> Shape:
    """The shape of what `join` makes of parts of this shape."""
    return ops[0].whole(shape) if isinstance(ops[0], Every) else shape


def shape(ops: Ops, shape: Shape) -> Shape:
    """The shape of what `ops` make of a tensor of `shape`."""
    for op in ops:
        shape = op.shape(shape)
    return shape


def codec(ops: Ops, codec: Codec) -> Codec:
    """The codec of what `ops` make of a tensor of `codec`."""
    for op in ops:
        codec = op.codec(codec)
    return codec
