"""ggml types that are read and carried as they are, never fitted: decoded by the gguf package."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fewbits.codecs.base import Codec, Grid, Params, Planes, Shape
from fewbits.errors import FewbitsError
from fewbits.lazy import torch

TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "NVFP4")


class _Values(Grid):
    """Codes that are the values."""

    def encode(self, w: torch.Tensor) -> torch.Tensor:
        raise FewbitsError("a ggml type that is only decoded has no codes to choose")

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes

    def columns(self, index: torch.Tensor | slice) -> Grid:
        return self


@dataclass(frozen=True)
class DecodeOnly(Codec):
    """A ggml type by its name; planes are the file's own bytes, codes the decoded float32 values."""

    kind: str
    family: ClassVar[str] = "ggml"

    @property
    def name(self) -> str:
        return self.kind

    @property
    def _sizes(self) -> tuple[int, int]:
        """Weights and bytes of a block."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        return GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]

    def unit(self, columns: int) -> int:
        return max(1, columns)

    def check(self, shape: Shape) -> str | None:
        block = self._sizes[0]
        return f"{shape[-1]} columns are no multiple of {block}" if shape[-1] % block else None

    def nbytes(self, shape: Shape) -> int:
        block, size = self._sizes
        return math.prod(shape) // block * size

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Params | None = None) -> Params:
        raise self._refusal()

    def grid(self, params: Params, columns: int) -> Grid:
        return _Values()

    def pack(self, codes: torch.Tensor, params: Params, shape: Shape) -> Planes:
        raise self._refusal()

    def _refusal(self) -> FewbitsError:
        return FewbitsError(f"{self.kind} can be read, not produced", "take TQ2_0, Q2_K, Q3_K, IQ4_XS or MXFP4")

    def unpack(self, planes: Planes, shape: Shape) -> tuple[torch.Tensor, Params]:
        import numpy as np
        from gguf import quants
        from gguf.constants import GGMLQuantizationType

        blocks = planes["blocks"]
        with np.errstate(over="ignore", invalid="ignore"):  # damaged scales decode to infinities, as they should
            values = quants.dequantize(blocks.cpu().numpy(), GGMLQuantizationType[self.kind])
        found = torch.from_numpy(values.reshape(self.matrix(shape))).to(blocks.device)
        return found, {"none": found.new_zeros(len(blocks), 1, 0)}

    def planes(self, shape: Shape) -> dict[str, tuple[str, Shape]]:
        rows = self.matrix(shape)[0]
        return {"blocks": ("uint8", (rows, self.nbytes(shape) // rows))}


def parse(name: str) -> Codec | None:
    return DecodeOnly(name.upper()) if name.upper() in TYPES else None
