"""One `.safetensors` file: a header of names, types and offsets, then the tensors side by side.

Layout: 8 bytes little-endian length of the header, the header in JSON, the data without holes.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fewbits.codecs.base import Shape
from fewbits.containers.base import flat_bytes
from fewbits.errors import FewbitsError
from fewbits.lazy import torch

Spec = tuple[str, Shape]  # the file's name of the type, and the shape

# name in the file -> (name in torch, bytes), in the order in which the library sorts tensors, last first
DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E8M0": ("float8_e8m0fnu", 1), "I16": ("int16", 2), "U16": ("uint16", 2),
    "F16": ("float16", 2), "BF16": ("bfloat16", 2), "I32": ("int32", 4), "U32": ("uint32", 4), "F32": ("float32", 4),
    "C64": ("complex64", 8), "F64": ("float64", 8), "I64": ("int64", 8), "U64": ("uint64", 8),
}
RANK = {name: i for i, name in enumerate(DTYPES)}
HEADER_LIMIT = 100_000_000  # bytes; the library's own limit
MOST_TENSORS = 1 << 17  # in one file: more than any model has, and few enough that the header's objects fit into memory
NAME_LIMIT, DIMENSIONS = 500, 64  # torch has no more dimensions


def nbytes(spec: Spec) -> int:
    return math.prod(spec[1]) * DTYPES[spec[0]][1]


@dataclass(frozen=True)
class Raw:
    """A tensor as a file holds it; nothing is read before it is asked for."""

    file: SafeTensors
    name: str
    dtype: str
    shape: Shape
    start: int  # bytes from the beginning of the file
    end: int

    @property
    def spec(self) -> Spec:
        return self.dtype, self.shape

    def data(self) -> bytes:
        return self.file.mapped()[self.start:self.end]

    def array(self) -> np.ndarray | None:
        """Its bytes, sharing the read-only mapping; None where they are not in a mapped file."""
        return np.frombuffer(self.file.mapped(), np.uint8, self.end - self.start, self.start)

    def tensor(self) -> torch.Tensor:
        """The tensor, sharing the read-only mapping: writing into it would end the process."""
        torch_name, size = DTYPES[self.dtype]
        if self.start == self.end:
            return torch.empty(self.shape, dtype=getattr(torch, torch_name))
        part = self.file.base()[self.start:self.end]
        if self.start % size:
            part = part.clone()  # torch cannot view bytes that are not aligned
        return part.view(getattr(torch, torch_name)).reshape(self.shape)

    def finite(self) -> torch.Tensor:
        """The tensor, all of whose values must be finite.

        Raises:
            FewbitsError: NaN or infinity; the place of the first is named.
        """
        tensor = self.tensor()
        bad = (~torch.isfinite(tensor)).nonzero()
        if len(bad):
            at = tuple(bad[0].tolist())
            raise self.refuse(f"{float(tensor[at])} at {list(at)}", "the file is damaged, or its layer was quantized "
                              "with NaN or infinite weights")
        return tensor

    def finite_array(self) -> np.ndarray | None:
        """The tensor of floats without torch, bfloat16 as uint16; None as of `array`.

        Raises:
            FewbitsError: NaN or infinity, as of `finite`.
        """
        data = self.array()
        if data is None:
            return None
        found = data.view({"F16": "<f2", "BF16": "<u2", "F32": "<f4"}[self.dtype]).reshape(self.shape)
        fine = (found & 0x7F80) != 0x7F80 if self.dtype == "BF16" else np.isfinite(found)
        if not fine.all():
            self.finite()
        return found

    def refuse(self, reason: str, hint: str | None = None) -> FewbitsError:
        return FewbitsError(f"{self.file.path}: {self.name}: {reason}", hint)


class SafeTensors:
    """A file opened for reading: its header checked, its data mapped when first asked for.

    Raises:
        FewbitsError: the header is not one, or does not describe the data exactly.
    """

    def __init__(self, path: Path):
        self.path = path
        self._mapped: mmap.mmap | None = None
        self._base: torch.Tensor | None = None
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            if len(head) < 8:
                raise self._bad(f"{self.size} bytes are too few for a header")
            length = struct.unpack("<Q", head)[0]
            if length < 2 or length > min(HEADER_LIMIT, self.size - 8):
                raise self._bad(f"a header of {length} bytes cannot be in a file of {self.size} bytes")
            header = self._parse(file.read(length))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise self._bad("__metadata__ is not an object")
        self.metadata: dict[str, Any] = metadata
        self.tensors = {name: self._raw(name, info, 8 + length) for name, info in header.items()}
        self._check_coverage(8 + length)

    def _bad(self, reason: str) -> FewbitsError:
        return FewbitsError(f"{self.path}: not a sound safetensors file: {reason}", "fetch or write the file again")

    def _parse(self, text: bytes) -> dict[str, Any]:
        if text.count(b'"data_offsets"') > MOST_TENSORS:
            raise self._bad(f"it has more than {MOST_TENSORS} tensors")

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(pairs)
            if len(found) < len(pairs):
                name = Counter(name for name, _ in pairs).most_common(1)[0][0]
                raise self._bad(f"{name[:NAME_LIMIT]!r} appears twice in the header")
            return found

        try:
            header = json.loads(text.decode(), object_pairs_hook=unique)  # of bytes, json would take UTF-16 too
        except FewbitsError:
            raise
        except (ValueError, RecursionError) as error:
            raise self._bad(f"the header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._bad("the header is not a JSON object")
        return header

    def _raw(self, name: str, info: Any, begin: int) -> Raw:
        if not name or not name.isprintable() or ".." in name or len(name) > NAME_LIMIT:
            raise self._bad(f"a tensor called {name[:NAME_LIMIT]!r}")
        if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"{name}: needs dtype, shape and data_offsets")
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._bad(f"{name}: unknown dtype {dtype!r}")
        if isinstance(shape, list) and len(shape) > DIMENSIONS:
            raise self._bad(f"{name}: {len(shape)} dimensions")
        if not _naturals(shape):
            raise self._bad(f"{name}: shape {shape!r}")
        if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= self.size - begin:
            raise self._bad(f"{name}: data_offsets {offsets!r} in {self.size - begin} bytes of data")
        needed = nbytes((dtype, shape))
        if offsets[1] - offsets[0] != needed:
            raise self._bad(f"{name}: {dtype} {shape} takes {needed} bytes, data_offsets {offsets} hold "
                            f"{offsets[1] - offsets[0]}")
        return Raw(self, name, dtype, tuple(shape), begin + offsets[0], begin + offsets[1])

    def _check_coverage(self, begin: int) -> None:
        at = begin
        for raw in sorted(self.tensors.values(), key=lambda r: (r.start, r.end)):
            if raw.start != at:
                raise self._bad(f"{raw.name}: begins at byte {raw.start - begin} of the data where {at - begin} "
                                f"was expected ({'overlap' if raw.start < at else 'hole'})")
            at = raw.end
        if at != self.size:
            raise self._bad(f"{self.size - at} bytes behind the last tensor")

    def mapped(self) -> mmap.mmap:
        """The whole file, read-only."""
        if self._mapped is None:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size != self.size:
                    raise self._bad("its size changed since it was opened")
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._mapped

    def base(self) -> torch.Tensor:
        if self._base is None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                self._base = torch.frombuffer(self.mapped(), dtype=torch.uint8)
        return self._base


def take(raws: dict[str, Raw], name: str, owner: Raw) -> Raw:
    """Take the tensor `name`, which `owner` cannot do without, out of `raws`.

    Raises:
        FewbitsError: it is missing.
    """
    if name not in raws:
        raise owner.refuse(f"needs {name}, which is missing")
    return raws.pop(name)


def header_of(path: Path) -> bytes:
    """The bytes of a file's header, unchecked; of no more than it has."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, HEADER_LIMIT, os.fstat(file.fileno()).st_size))


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


class Writer:
    """Writes a file whose names, types and shapes are known before its data; tensors come in any order.

    The bytes are those that the safetensors library writes: tensors by type, widest first, then by name; the header
    padded to a multiple of 8 with spaces.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None):
        self.path, self.specs = path, dict(specs)
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        at, self._offsets = 0, {}
        for name in sorted(self.specs, key=lambda n: (-RANK[self.specs[n][0]], n)):
            dtype, shape = self.specs[name]
            self._offsets[name] = at
            end = at + nbytes((dtype, shape))
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._begin = 8 + len(text)
        self._file = open(path, "xb")  # noqa: SIM115
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._begin + at)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor in its place; each name once."""
        dtype, shape = self.specs[name]
        if tensor.dtype != getattr(torch, DTYPES[dtype][0]) or tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name}: announced as {dtype} {list(shape)}, "
                             f"written as {tensor.dtype} {list(tensor.shape)}")
        self._file.seek(self._begin + self._offsets.pop(name))
        if tensor.numel():
            self._file.write(flat_bytes(tensor.detach().cpu()).numpy().data)

    def close(self) -> None:
        """Finish the file.

        Raises:
            ValueError: a tensor that was announced was never written.
        """
        self._file.close()
        if self._offsets:
            raise ValueError(f"{self.path}: {sorted(self._offsets)[0]} was announced and not written")

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
