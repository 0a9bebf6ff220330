"""The row algebra: small reversible steps between a tensor as Transformers holds it and as a file holds it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fewbits import stored
from fewbits.codecs.base import Codec, Shape
from fewbits.codecs.floats import F32, Float
from fewbits.lazy import torch
from fewbits.qtensor import QTensor
from fewbits.stored import Stored


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

    def find(self, tensor: Stored) -> Stored:
        """`undo` of what lies in a file, without loading it."""
        raise NotImplementedError


class _Permute(Op):
    """Rows in another order."""

    def index(self, rows: int) -> np.ndarray:
        """Which row of Transformers' tensor each row of the file is."""
        raise NotImplementedError

    def apply(self, tensor: QTensor) -> QTensor:
        return tensor.rows(torch.from_numpy(self.index(tensor.shape[0])))

    def undo(self, tensor: QTensor) -> QTensor:
        return tensor.rows(torch.from_numpy(np.argsort(self.index(tensor.shape[0]))))

    def find(self, tensor: Stored) -> Stored:
        return tensor.pick(np.argsort(self.index(tensor.rows)))


@dataclass(frozen=True)
class RopePermute(_Permute):
    """Rows of a query or key projection from half-split rotary pairs (i, i + d/2) to neighbouring ones (2i, 2i + 1)."""

    heads: int

    def index(self, rows: int) -> np.ndarray:
        if rows % (2 * self.heads):
            raise ValueError(f"{rows} rows do not divide into {self.heads} heads of rotary pairs")
        return np.arange(rows).reshape(self.heads, 2, -1).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True)
class Regroup(_Permute):
    """Rows of a fused projection from head by head (q0 k0 v0 q1 ...) to part by part (q0 q1 ... k0 k1 ... v0 ...)."""

    heads: int
    parts: int

    def index(self, rows: int) -> np.ndarray:
        if rows % (self.parts * self.heads):
            raise ValueError(f"{rows} rows do not divide into {self.heads} heads of {self.parts} parts")
        return np.arange(rows).reshape(self.heads, self.parts, -1).swapaxes(0, 1).reshape(-1)


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

    def find(self, tensor: Stored) -> Stored:
        return replace(tensor, plus=tensor.plus - 1.0)

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

    def find_all(self, parts: list[Stored], shape: Shape) -> Stored | None:
        """`join` of what lies in a file, each part of `shape`."""
        if self.axis == -1:  # entries are rows
            parts = [replace(p, columns=1) for p in parts]
        found = stored.join(parts)
        if found is None or len(parts) != self.count:
            return None
        turns = np.arange(found.rows).reshape(self.count, math.prod(shape[:self.axis]), shape[self.axis])
        return found.pick(np.moveaxis(turns, 0, -1).reshape(-1))


Ops = tuple[Op, ...]


def apply(ops: Ops, tensor: QTensor) -> QTensor:
    for op in ops:
        tensor = op.apply(tensor)
    return tensor


def undo(ops: Ops, tensor: QTensor) -> QTensor:
    for op in reversed(ops):
        tensor = op.undo(tensor)
    return tensor


def find(ops: Ops, tensor: Stored) -> Stored:
    """`undo` of what lies in a file, without loading it."""
    for op in reversed(ops):
        tensor = op.find(tensor)
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


def find_all(parts: list[tuple[Ops, Stored]], shape: Shape) -> Stored | None:
    """`join` of what lies in a file, each part of `shape`; None where the parts do not lie alike."""
    first = parts[0][0][0]
    assert isinstance(first, Every), first
    found = {ops[0].first: find(ops[1:], tensor) for ops, tensor in parts if isinstance(ops[0], Every)}
    return first.find_all([found[i] for i in sorted(found)], shape)


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
