"""Importance matrices: the mean square of every input of a model's matrices, in llama.cpp's files.

`read` and `write` the files, `collect` one from a calibration text, `Imatrix.statistics(source)` to quantize with it.
"""

from __future__ import annotations

from fewbits.calibration.statistics import Diagonal
from fewbits.imatrix.collecting import collect
from fewbits.imatrix.data import Imatrix, Sums
from fewbits.imatrix.files import is_imatrix, read, write

__all__ = ["Diagonal", "Imatrix", "Sums", "collect", "is_imatrix", "read", "write"]
