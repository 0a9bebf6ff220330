"""ggml's blocks as they were before GGUF: read from old files, never written.

Until ggjt 1 column 2 i lay in the low and column 2 i + 1 in the high nibble of byte i (since then, i and i + 16); until
ggjt 2 the scales of Q4_0, Q4_1 and Q8_0 had 32 bits (since then, 16). Q4_2 and Q4_3 had 16 columns a block.
https://github.com/ggml-org/llama.cpp/pull/1405 and pull/1508
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fewbits.codecs import ggml
from fewbits.codecs.base import Codec, Grid, Params
from fewbits.codecs.ggml import Blocks, split_halves
from fewbits.codecs.grids import UniformGrid
from fewbits.codecs.packing import split_fields, unpack_bits
from fewbits.errors import FewbitsError
from fewbits.lazy import torch


@dataclass(frozen=True)
class Old(Blocks):
    """`d * (code - zero)`, or `d * code + m`, with the fields and in the order of `version` of the file layout."""

    label: str
    version: int  # of ggjt; older files are like 1
    bits: int
    minimum: bool
    wide: bool  # scales have 32 bits
    columns: int = 32  # type: ignore[misc]
    family: ClassVar[str] = "ggml-old"

    @property
    def name(self) -> str:
        return f"{self.label}-ggjt{self.version}"

    @property
    def scale_bytes(self) -> int:
        return 4 if self.wide else 2

    @property
    def block_bytes(self) -> int:
        return self.scale_bytes * (1 + self.minimum) + self.columns * self.bits // 8

    @property
    def today(self) -> Codec | None:
        """The present type that holds the same values, or None."""
        return ggml.TYPES[self.label] if self.label in ggml.TYPES and not self.wide else None

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Any = None) -> Params:
        raise FewbitsError(f"{self.name} is read, not written", "take Q4_0, Q5_0 or Q8_0")

    def grid(self, params: Params, columns: int) -> Grid:
        top = (1 << self.bits) - 1
        if self.minimum:
            return UniformGrid(params["d"].float(), top, columns, offset=params["m"].float())
        return UniformGrid(params["d"].float(), top, columns, zero=float(1 << (self.bits - 1)))

    def split(self, blocks: torch.Tensor) -> tuple[torch.Tensor, Params]:
        kind = torch.float32 if self.wide else torch.float16
        sizes = [(self.scale_bytes, kind)] * (1 + self.minimum)
        rest = self.block_bytes - sum(size for size, _ in sizes)
        *values, data = split_fields(blocks, *sizes, (rest, torch.uint8))
        params = dict(zip(("d", "m"), values, strict=False))
        if self.bits == 8:
            return data ^ 128, params
        low = data[..., -self.columns // 2:].contiguous()
        codes = unpack_bits(low, 4, self.columns) if self.version == 1 else split_halves(low, 16)
        if self.bits == 5:
            codes = codes | (unpack_bits(data[..., :4].contiguous(), 1, 32) << 4)
        return codes, params

    def join(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        raise FewbitsError(f"{self.name} is read, not written", "take Q4_0, Q5_0 or Q8_0")


TYPES: dict[int, dict[str, Old]] = {
    1: {c.label: c for c in (Old("Q4_0", 1, 4, False, True), Old("Q4_1", 1, 4, True, True),
                             Old("Q4_2", 1, 4, False, False, 16), Old("Q4_3", 1, 4, True, False, 16),
                             Old("Q5_0", 1, 5, False, False), Old("Q5_1", 1, 5, True, False),
                             Old("Q8_0", 1, 8, False, True))},
    2: {c.label: c for c in (Old("Q4_0", 2, 4, False, True), Old("Q4_1", 2, 4, True, True),
                             Old("Q8_0", 2, 8, False, True))},
}  # what is not here did not change
