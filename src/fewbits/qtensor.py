"""One quantized tensor: a codec, a shape and packed planes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewbits.codecs.base import Codec, Params, Planes, Shape, decode_units
from fewbits.devices import at_once
from fewbits.lazy import torch

CHUNK = 1 << 21  # weights decoded at a time: float32 temporaries stay near the caches


@dataclass(frozen=True)
class QTensor:
    """Packed planes of a codec, canonical layout; leading dimensions are rows: `[experts, out, in]`.

    `order`, where given, says which stored column each column of the weight is (full act-order): stored = w[:, order].
    A stack of experts has one order each, `[experts, in]`.
    """

    codec: Codec
    shape: Shape
    planes: Planes
    order: torch.Tensor | None = None

    @classmethod
    def pack(cls, codec: Codec, shape: Shape, codes: torch.Tensor, params: Params) -> QTensor:
        return cls(codec, tuple(shape), codec.pack(codes, params, tuple(shape)))

    @property
    def nbytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.planes.values())

    @property
    def device(self) -> torch.device:
        return next(iter(self.planes.values())).device

    def to(self, device: torch.device) -> QTensor:
        """The same tensor, its planes on another device."""
        order = None if self.order is None else self.order.to(device)
        return QTensor(self.codec, self.shape, {k: p.to(device) for k, p in self.planes.items()}, order)

    def unpack(self) -> tuple[torch.Tensor, Params]:
        """Codes `[rows, columns]` and parameters `[rows, units, k]`."""
        return self.codec.unpack(self.planes, self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight `[*shape]`, float32 unless `dtype` says otherwise."""
        out = torch.empty(self.shape, dtype=dtype or torch.float32, device=self.device)
        if not self.codec.rows_apart(self.shape):
            flat = decode_units(*self._arguments(self.unpack()))
            out.view(-1).copy_(flat.reshape(-1)[:out.numel()])
        else:
            rows, columns = self.codec.matrix(self.shape)
            flat, step = out.view(rows, columns), max(1, at_once(self.device, CHUNK) // max(1, columns))
            for at in range(0, rows, step):
                part = self.part(slice(at, min(at + step, rows)))
                flat[at:at + step].copy_(decode_units(*self._arguments(part.unpack())))
        if self.order is not None:
            back = torch.argsort(self.order)  # [in], [rows, in] or [experts, in]
            if back.ndim == 1:
                out = out.index_select(-1, back)
            else:
                out = out.gather(-1, back.unsqueeze(1).expand(self.shape) if out.ndim == 3 else back)
        return out

    def _arguments(self, unpacked: tuple[torch.Tensor, Params]) -> tuple[torch.Tensor, Codec, Params]:
        return unpacked[0], self.codec, unpacked[1]

    def part(self, index: slice | torch.Tensor) -> QTensor:
        """Rows of the matrix that units lie in, still packed; only where the codec packs rows apart."""
        planes = {k: p[index] for k, p in self.planes.items()}
        rows, order = len(next(iter(planes.values()))), self.order
        if order is not None and order.ndim == 2:
            order = order.repeat_interleave(math.prod(self.shape[:-1]) // len(order), 0)[index]
        return QTensor(self.codec, (rows, self.shape[-1]), planes, order)

    def rows(self, index: torch.Tensor) -> QTensor:
        """The rows `index` of a matrix, still packed.

        Raises:
            ValueError: the codec's blocks cross rows in this shape.
        """
        if len(self.shape) == 1:
            return QTensor(self.codec, (len(index),), {k: p[:, index] for k, p in self.planes.items()})
        if not self.codec.rows_apart(self.shape):
            raise ValueError(f"{self.codec.name}: blocks cross rows at shape {list(self.shape)}")
        return self.part(index)

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / max(1, math.prod(self.shape))
