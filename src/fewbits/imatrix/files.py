"""llama.cpp's two kinds of importance-matrix file: a GGUF file, and the older `.dat`; its first bytes say which.

docs/formats/imatrix.md has both byte by byte. Facts from llama.cpp: tools/imatrix, common/imatrix-loader.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.containers import gguf_file
from fewbits.containers.base import check_output, remove, sync
from fewbits.containers.gguf_file import GgufFile, Reader, Spec, Value
from fewbits.errors import FewbitsError
from fewbits.imatrix.data import CHUNK_SIZE, Imatrix, Sums

SUMS, COUNTS = ".in_sum2", ".counts"
TYPE, TEXTS, CHUNKS, SIZE = "general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
MOST = 1 << 40  # tokens of a believable count
INT32 = 2**31 - 1
SMALLEST = 17  # bytes of an entry of the old kind: three numbers, a letter, a value
NO_MATRIX = "an importance matrix is what llama-imatrix or fewbits imatrix writes"


def read(path: str | Path) -> Imatrix:
    """The importance matrix in a file of either kind.

    Raises:
        FewbitsError: neither kind, cut short, or with values that cannot be sums of squares; file and tensor are named.
    """
    path = Path(path)
    if not path.is_file():
        raise FewbitsError(f"{path}: no such file", NO_MATRIX)
    with open(path, "rb") as file:
        magic = file.read(4)
    return _from_gguf(gguf_file.read(path)) if magic == gguf_file.MAGIC else _from_dat(path)


def is_imatrix(path: str | Path) -> bool:
    """Whether `path` is an importance matrix rather than a model: a GGUF file that says so, or one called *.dat."""
    path = Path(path)
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        if file.read(4) != gguf_file.MAGIC:
            return path.suffix == ".dat"
    return gguf_file.read(path).metadata.get(TYPE) == Value("STRING", "imatrix")


def write(path: str | Path, imatrix: Imatrix) -> None:
    """Write the GGUF kind, or the old one where the name ends in .dat.

    Raises:
        FewbitsError: `path` exists, or there is nothing to write.
    """
    path = Path(path).resolve()
    check_output(path, None)
    if not imatrix.entries:
        raise FewbitsError(f"{path}: an importance matrix of no tensor is not written")
    partial = path.with_name(f".{path.name}.partial")
    try:
        (_to_dat if path.suffix == ".dat" else _to_gguf)(partial, imatrix)
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        remove(partial)
        raise


def _checked(path: Path, name: str, sums: np.ndarray, counts: np.ndarray) -> Sums:
    """Sums `[matrices, in]` for values in any shape."""
    for what, values in (("sum of squares", sums), ("count", counts)):
        bad = ~(values >= 0) | (values > (MOST if values is counts else np.inf)) | np.isinf(values)
        if bad.any():
            raise FewbitsError(f"{path}: tensor {name!r} has a {what} of {values[bad].flat[0]}",
                               "collect the importance matrix again")
    if sums.size % counts.size:
        raise FewbitsError(f"{path}: tensor {name!r} has {sums.size} sums for {counts.size} counts")
    sums = sums.astype(np.float32, copy=False).reshape(counts.size, -1)
    return Sums(sums, np.rint(counts).astype(np.int64).reshape(-1))


# the GGUF kind ------------------------------------------------------------------------------------------------------
def _from_gguf(file: GgufFile) -> Imatrix:
    kind = file.metadata.get(TYPE)
    if kind is None or kind.value != "imatrix":
        what = "does not say" if kind is None else f"is {kind.value!r}"
        raise FewbitsError(f"{file.path}: is no importance matrix: {TYPE} {what}", NO_MATRIX)
    parts: dict[str, dict[str, np.ndarray]] = {}
    for spec in file.tensors.values():  # other endings are left alone, as llama.cpp does: newer writers may add some
        name, dot, ending = spec.name.rpartition(".")
        if dot + ending in (SUMS, COUNTS):
            if spec.type != "F32":
                raise FewbitsError(f"{file.path}: tensor {spec.name!r} is {spec.type}; F32 is expected")
            parts.setdefault(name, {})[dot + ending] = file.data(spec).view(np.float32)
    for name, found in parts.items():
        if len(found) != 2:
            missing = SUMS if COUNTS in found else COUNTS
            raise FewbitsError(f"{file.path}: tensor {name + missing!r} is missing", "the file is not whole")
    if not parts:
        raise FewbitsError(f"{file.path}: an importance matrix of no tensor", NO_MATRIX)
    entries = {name: _checked(file.path, name, p[SUMS], p[COUNTS]) for name, p in parts.items()}
    return Imatrix(entries, list(_meta(file, TEXTS, "ARRAY", "STRING")), int(_meta(file, CHUNKS, "UINT32")),
                   int(_meta(file, SIZE, "UINT32")), file.path)


def _meta(file: GgufFile, key: str, type: str, items: str = "") -> Any:
    found = file.metadata.get(key)
    if found is None or (found.type, found.items) != (type, items):
        has = "missing" if found is None else found.items + " " * bool(found.items) + found.type
        raise FewbitsError(f"{file.path}: {key} is {has}; {type} is expected", NO_MATRIX)
    return found.value


def _to_gguf(path: Path, imatrix: Imatrix) -> None:
    metadata = {TYPE: Value("STRING", "imatrix"), TEXTS: Value("ARRAY", imatrix.datasets, "STRING"),
                CHUNKS: Value("UINT32", imatrix.chunks), SIZE: Value("UINT32", imatrix.chunk_size)}
    specs: list[Spec] = []
    data: list[np.ndarray] = []
    for name, s in sorted(imatrix.entries.items()):
        matrices, inputs = s.sums.shape
        one = matrices == 1  # ggml drops dimensions of 1 at the end
        specs += [Spec(name + SUMS, (inputs,) if one else (matrices, inputs), "F32"),
                  Spec(name + COUNTS, (1,) if one else (matrices, 1), "F32")]
        data += [np.ascontiguousarray(s.sums, "<f4"), s.counts.astype("<f4")]
    gguf_file.write(path, metadata, specs, iter(data))


# the old kind -------------------------------------------------------------------------------------------------------
def _from_dat(path: Path) -> Imatrix:
    reader = Reader(path, path.read_bytes())  # type: ignore[arg-type]
    total = reader.size >= 4 and reader.take("<i", "number of entries")
    if not 1 <= total <= reader.size // SMALLEST:
        raise FewbitsError(f"{path}: neither a GGUF file nor an importance matrix of the old kind", NO_MATRIX)
    entries: dict[str, Sums] = {}
    for i in range(total):
        name = _text(reader, f"the name of entry {i}", least=1)
        if name in entries:
            raise reader.error(f"tensor {name!r} appears twice")
        calls = reader.take("<i", f"the calls of tensor {name!r}")
        count = reader.take("<i", f"the number of values of tensor {name!r}")
        if not 1 <= count <= (reader.size - reader.at) // 4:
            raise reader.error(f"tensor {name!r} has {count} values; {reader.size - reader.at} bytes are left")
        values = np.frombuffer(reader.bytes(4 * count, f"tensor {name!r}"), "<f4")
        if calls < 0:
            raise reader.error(f"tensor {name!r} has {calls} calls")
        tokens = CHUNK_SIZE * (calls or 1)  # with 0 calls, the values are means already
        entries[name] = _checked(path, name, values * np.float32(CHUNK_SIZE), np.array([tokens]))
    chunks, datasets = 0, []
    if reader.at < reader.size:  # the oldest files end here
        chunks = reader.take("<i", "the number of chunks")
        text = _text(reader, "the name of the text", least=0) if reader.at < reader.size else ""
        datasets = [text] if text else []
    if reader.at < reader.size:
        raise reader.error(f"{reader.size - reader.at} bytes after its end", NO_MATRIX)
    return Imatrix(entries, datasets, max(chunks, 0), CHUNK_SIZE, path)


def _text(reader: Reader, what: str, least: int) -> str:
    length = reader.take("<i", f"the length of {what}")
    if not least <= length <= reader.size - reader.at:
        raise reader.error(f"{what} has {length} bytes; {reader.size - reader.at} are left")
    try:
        return reader.bytes(length, what).decode()
    except UnicodeDecodeError as error:
        raise reader.error(f"{what} is not valid UTF-8 at its byte {error.start}") from None


def _to_dat(path: Path, imatrix: Imatrix) -> None:
    """Tensors that saw no token at all are left out; an expert that saw none gets ones."""
    seen = {name: s for name, s in sorted(imatrix.entries.items()) if s.counts.any()}
    with open(path, "wb") as file:
        file.write(struct.pack("<i", len(seen)))
        for part in _dat_parts(seen, imatrix.chunk_size):
            file.write(part)
        text = (imatrix.datasets[-1] if imatrix.datasets else "").encode()
        file.write(struct.pack("<ii", min(imatrix.chunks, INT32), len(text)) + text)


def _dat_parts(entries: dict[str, Sums], chunk_size: int) -> Iterator[bytes]:
    for name, s in entries.items():
        calls = min(-(-int(s.counts.max()) // chunk_size), INT32)
        counts = s.counts[:, None].astype(np.float64)
        means = np.where(counts > 0, s.sums / np.maximum(counts, 1), 1)
        yield struct.pack("<i", len(name.encode())) + name.encode() + struct.pack("<ii", calls, s.sums.size)
        yield (means * calls).astype("<f4").tobytes()
