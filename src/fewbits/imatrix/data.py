"""What an importance matrix holds, whichever file it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fewbits.calibration.statistics import Diagonal
    from fewbits.checkpoint import Checkpoint

CHUNK_SIZE = 512  # tokens, unless llama-imatrix is told otherwise; the old kind of file does not say


@dataclass(frozen=True)
class Sums:
    """One tensor's inputs: sums of their squares `[matrices, in]` (float32) over `counts` `[matrices]` tokens (int64).

    A tensor has one matrix, or one an expert; the old kind of file holds experts in a row, `[1, experts * in]`.
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Mean squares `[matrices, in]`; 1 throughout where no token was seen, as llama.cpp takes it."""
        seen = self.counts[:, None] > 0
        return np.where(seen, self.sums / np.maximum(self.counts[:, None], 1), 1).astype(np.float32)


@dataclass(frozen=True)
class Imatrix:
    """Sums by GGUF's names of the tensors; `chunks` sequences of `chunk_size` tokens of the texts `datasets`."""

    entries: dict[str, Sums]
    datasets: list[str] = field(default_factory=list)
    chunks: int = 0
    chunk_size: int = CHUNK_SIZE
    path: Path | None = None  # of the file that it came from

    @property
    def unseen(self) -> list[str]:
        """Tensors of which some matrix, that of an expert, saw no token."""
        return [name for name, s in self.entries.items() if not s.counts.all()]

    def statistics(self, source: Checkpoint) -> dict[str, Diagonal]:
        """Importances for the tensors of `source`, by their Transformers names; tensors without any are left out.

        Raises:
            FewbitsError: a family without GGUF names, or an importance matrix of another model.
        """
        from fewbits.imatrix.matching import statistics

        return statistics(self, source)
