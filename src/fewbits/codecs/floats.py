"""Unquantized formats: float32, float16, bfloat16. Codes are the bits themselves; there are no parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fewbits.codecs.base import Codec, Grid, Params, Planes, Shape
from fewbits.lazy import torch


class _FloatGrid(Grid):
    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def encode(self, w: torch.Tensor) -> torch.Tensor:
        return w.to(self.dtype)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.float()

    def columns(self, index: torch.Tensor | slice) -> Grid:
        return self


@dataclass(frozen=True)
class Float(Codec):
    """IEEE single, half, or brain float; a code is the rounded value."""

    kind: str
    family: ClassVar[str] = "float"
    DTYPES: ClassVar[dict[str, str]] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

    @property
    def name(self) -> str:
        return self.kind

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.DTYPES[self.kind])

    def unit(self, columns: int) -> int:
        return max(1, columns)

    def nbytes(self, shape: Shape) -> int:
        return math.prod(shape) * (4 if self.kind == "F32" else 2)

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Params | None = None) -> Params:
        return {"none": w.new_zeros(*w.shape[:-1], 0, dtype=torch.float32)}

    def grid(self, params: Params, columns: int) -> Grid:
        return _FloatGrid(self.dtype)

    def pack(self, codes: torch.Tensor, params: Params, shape: Shape) -> Planes:
        return {"data": codes.to(self.dtype)}

    def unpack(self, planes: Planes, shape: Shape) -> tuple[torch.Tensor, Params]:
        data = planes["data"]
        return data, {"none": data.new_zeros(len(data), 1, 0, dtype=torch.float32)}

    def planes(self, shape: Shape) -> dict[str, tuple[str, Shape]]:
        return {"data": (self.DTYPES[self.kind], self.matrix(shape))}


F32, F16, BF16 = Float("F32"), Float("F16"), Float("BF16")


def parse(name: str) -> Codec | None:
    spellings = {"F32": F32, "FLOAT32": F32, "F16": F16, "FLOAT16": F16, "BF16": BF16, "BFLOAT16": BF16}
    return spellings.get(name.upper())
