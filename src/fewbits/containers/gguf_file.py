"""GGUF on the level of bytes: typed metadata and tensor places, mapped and strict; a streaming writer of version 3.

Layout: magic, version, tensor count, metadata count; metadata (key, type, value); tensor records (name, dimensions
innermost first, type, offset); then, from the next multiple of the alignment on, the tensors. All is little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.containers import gguf_strings
from fewbits.containers.gguf_types import NAMES, TYPES
from fewbits.errors import FewbitsError

MAGIC = b"GGUF"
ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
MAX_RECORDS = 1 << 16  # tensors, and metadata pairs: each costs far more memory than its few bytes in the file
REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8",
           38: "IQ4_NL_8_8"}  # type numbers that ggml gave and took back
SCALARS = {0: ("UINT8", "<B"), 1: ("INT8", "<b"), 2: ("UINT16", "<H"), 3: ("INT16", "<h"), 4: ("UINT32", "<I"),
           5: ("INT32", "<i"), 6: ("FLOAT32", "<f"), 7: ("BOOL", "<?"), 10: ("UINT64", "<Q"), 11: ("INT64", "<q"),
           12: ("FLOAT64", "<d")}
STRING, ARRAY = 8, 9
IDS = {name: i for i, (name, _) in SCALARS.items()} | {"STRING": STRING, "ARRAY": ARRAY}
FORMATS = {name: form for name, form in SCALARS.values()}


@dataclass(frozen=True, slots=True)
class Value:
    """A metadata value and its type as stored: "UINT32", "STRING" …; an array has type "ARRAY" and its items' type.

    Arrays of numbers are numpy arrays over the mapped file, arrays of strings are lists or decode from it on demand.
    """

    type: str
    value: Any
    items: str = ""


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor's record: `shape` outermost first, `type` by ggml's name, `offset` from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int = 0

    @property
    def nbytes(self) -> int:
        _, block, size = TYPES[self.type]
        return math.prod(self.shape) // block * size


@dataclass(frozen=True)
class GgufFile:
    """An opened file, or several that hold one model. Nothing of a tensor is read before `data` asks for it."""

    path: Path
    version: int
    metadata: dict[str, Value]
    tensors: dict[str, Spec]
    start: int  # where tensor data begin
    buffer: mmap.mmap
    parts: tuple[GgufFile, ...] = ()  # where the tensors are, if not here
    codecs: Mapping[str, Any] = field(default_factory=dict)  # of types that today's ggml does not have

    def data(self, spec: Spec) -> np.ndarray:
        """The tensor's bytes, mapped (changes to them stay in memory)."""
        for part in self.parts:
            if spec.name in part.tensors:
                return part.data(spec)
        return np.frombuffer(self.buffer, np.uint8, spec.nbytes, self.start + spec.offset)


class Reader:
    """A cursor over the header that never steps past the end of the file."""

    def __init__(self, path: Path, buffer: mmap.mmap):
        self.path, self.buffer, self.size, self.at = path, buffer, len(buffer), 0

    def error(self, what: str, hint: str | None = None) -> FewbitsError:
        return FewbitsError(f"{self.path}: {what}", hint)

    def take(self, form: str, what: str) -> Any:
        size = struct.calcsize(form)
        if self.at + size > self.size:
            raise self.error(f"ends inside {what} (byte {self.size})", "the file is cut short: fetch it again")
        value = struct.unpack_from(form, self.buffer, self.at)[0]
        self.at += size
        return value

    def count(self, what: str, smallest: int, most: int = 1 << 62) -> int:
        """A number of things, each of at least `smallest` bytes, that the rest of the file can hold."""
        count = int(self.take("<Q", what))
        if count > (self.size - self.at) // smallest:
            raise self.error(f"{what} is {count}, more than the remaining {self.size - self.at} bytes can hold")
        if count > most:
            raise self.error(f"{what} is {count}; at most {most} are read")
        return count

    def bytes(self, size: int, what: str) -> bytes:
        if self.at + size > self.size:
            raise self.error(f"ends inside {what} (byte {self.size})", "the file is cut short: fetch it again")
        self.at += size
        return self.buffer[self.at - size:self.at]

    def string(self, what: str) -> str:
        raw = self.bytes(self.count(f"length of {what}", 1), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not valid UTF-8 at its byte {error.start}") from None

    def name(self, what: str) -> str:
        """A string that other programs may take for a name: not empty, no NUL, no step out of a folder."""
        name = self.string(what)
        if not name or "\0" in name or ".." in name:
            raise self.error(f"{what} is {name!r}, which is no name")
        return name

    def strings(self, count: int, what: str) -> gguf_strings.Strings:
        try:
            found = gguf_strings.walk(self.buffer, self.at, count)
            found.check()
        except IndexError as error:
            raise self.error(f"{what}[{error.args[0]}] is longer than the file",
                             "the file is cut short: fetch it again") from None
        except gguf_strings.NotText as error:
            raise self.error(f"{what}[{error.index}] is not valid UTF-8 at its byte {error.byte}") from None
        self.at = found.end
        return found

    def scalar(self, kind: int, what: str) -> Value:
        name, form = SCALARS[kind]
        if name == "BOOL":
            raw = self.take("<B", what)
            if raw > 1:
                raise self.error(f"{what} is a boolean of value {raw}")
            return Value(name, bool(raw))
        return Value(name, self.take(form, what))

    def value(self, what: str) -> Value:
        kind = self.take("<I", f"type of {what}")
        if kind in SCALARS:
            return self.scalar(kind, what)
        if kind == STRING:
            return Value("STRING", self.string(what))
        if kind != ARRAY:
            raise self.error(f"{what} has the unknown value type {kind}")
        kind = self.take("<I", f"item type of {what}")
        if kind == STRING:
            return Value("ARRAY", self.strings(self.count(f"length of {what}", 8), what), "STRING")
        if kind not in SCALARS:
            nested = "arrays of arrays are" if kind == ARRAY else f"item type {kind} is"
            raise self.error(f"{what}: {nested} not supported")
        name, form = SCALARS[kind]
        count = self.count(f"length of {what}", struct.calcsize(form))
        data = np.frombuffer(self.buffer, np.dtype(form), count, self.at)
        if name == "BOOL" and data.view(np.uint8).max(initial=0) > 1:
            raise self.error(f"{what} holds a boolean that is neither 0 nor 1")
        self.at += data.nbytes
        return Value("ARRAY", data, name)

    def spec(self, alignment: int) -> Spec:
        name = self.name("a tensor's name")
        what = f"tensor {name!r}"
        dims = self.take("<I", f"number of dimensions of {what}")
        if not 1 <= dims <= MAX_DIMENSIONS:
            raise self.error(f"{what} has {dims} dimensions; 1 to {MAX_DIMENSIONS} are possible")
        shape = tuple(self.take("<Q", f"shape of {what}") for _ in range(dims))[::-1]
        kind, offset = self.take("<I", f"type of {what}"), self.take("<Q", f"offset of {what}")
        if kind in REMOVED:
            raise self.error(f"{what} has the type {kind}, {REMOVED[kind]}, which ggml no longer has",
                             "make the file again with a present type")
        if kind not in NAMES:
            raise self.error(f"{what} has the unknown type {kind}", "a newer fewbits may know it")
        if min(shape) < 1 or math.prod(shape) > 1 << 62:
            raise self.error(f"{what} has the impossible shape {list(shape)}")
        spec = Spec(name, shape, NAMES[kind], offset)
        block = TYPES[spec.type][1]
        if shape[-1] % block:
            raise self.error(f"{what}: rows of {shape[-1]} do not divide into blocks of {block} ({spec.type})")
        if offset % alignment:
            raise self.error(f"{what} starts at {offset}, which is no multiple of the alignment {alignment}")
        return spec


def read(path: Path) -> GgufFile:
    """Open a GGUF file, version 2 or 3: header checked, data mapped.

    Raises:
        FewbitsError: not GGUF, another version or byte order, or a header that contradicts itself or the file's size.
    """
    with open(path, "rb") as file:
        if file.seek(0, 2) < 24:
            raise FewbitsError(f"{path}: too short for a GGUF file ({file.tell()} bytes)")
        # private and writable, because torch warns about read-only memory; what is written never reaches the file
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    reader = Reader(path, buffer)
    if buffer[:4] != MAGIC:
        raise FewbitsError(f"{path}: not a GGUF file (starts with {buffer[:4]!r})")
    reader.at = 4
    version = reader.take("<I", "version")
    if version not in (2, 3):
        if version & 0xFFFF == 0 and version:
            raise reader.error("is a big-endian GGUF file", "convert it with gguf's gguf_convert_endian.py")
        raise reader.error(f"GGUF version {version}; 2 and 3 can be read")
    tensor_count, pair_count = (reader.count("tensor count", 32, MAX_RECORDS),
                                reader.count("metadata count", 13, MAX_RECORDS))
    metadata: dict[str, Value] = {}
    for _ in range(pair_count):
        key = reader.name("a metadata key")
        if key in metadata:
            raise reader.error(f"metadata key {key!r} appears twice")
        metadata[key] = reader.value(key)
    alignment = _alignment(reader, metadata)
    tensors: dict[str, Spec] = {}
    for _ in range(tensor_count):
        spec = reader.spec(alignment)
        if spec.name in tensors:
            raise reader.error(f"tensor {spec.name!r} appears twice")
        tensors[spec.name] = spec
    start = -(-reader.at // alignment) * alignment
    _check_places(reader, tensors, start, alignment)
    return GgufFile(path, version, metadata, tensors, start, buffer)


def _alignment(reader: Reader, metadata: dict[str, Value]) -> int:
    found = metadata.get("general.alignment", Value("UINT32", ALIGNMENT))
    if found.type != "UINT32" or not 1 <= found.value <= MAX_ALIGNMENT or found.value & (found.value - 1):
        raise reader.error(f"general.alignment is {found.value!r} ({found.type}); a power of two (UINT32) is needed")
    return int(found.value)


def _check_places(reader: Reader, tensors: dict[str, Spec], start: int, alignment: int) -> None:
    """Tensors lie one after the other in the order of their records, each on the alignment, as llama.cpp demands."""
    at = 0
    for spec in tensors.values():
        end = start + spec.offset + spec.nbytes
        if end > reader.size:
            raise reader.error(f"tensor {spec.name!r} ends at byte {end} of a file of {reader.size}",
                               "the file is cut short: fetch it again")
        if spec.offset != at:
            how = "overlaps what is before it" if spec.offset < at else "leaves a gap before it"
            raise reader.error(f"tensor {spec.name!r} starts at {spec.offset} and {how}: {at} is expected")
        at += -(-spec.nbytes // alignment) * alignment


# writing ------------------------------------------------------------------------------------------------------------
def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    if value.type == "STRING":
        return struct.pack("<I", STRING) + _string(value.value)
    if value.type != "ARRAY":
        return struct.pack("<I", IDS[value.type]) + struct.pack(FORMATS[value.type], value.value)
    head = struct.pack("<IIQ", ARRAY, IDS[value.items], len(value.value))
    if value.items == "STRING":
        texts = list(map(str.encode, value.value))
        lengths = map(struct.Struct("<Q").pack, map(len, texts))
        return head + b"".join(chain.from_iterable(zip(lengths, texts, strict=True)))
    return head + np.asarray(value.value).astype(FORMATS[value.items], copy=False).tobytes()


def place(specs: Sequence[Spec], alignment: int) -> list[Spec]:
    """The same tensors one after the other, each on the alignment."""
    placed, at = [], 0
    for spec in specs:
        placed.append(Spec(spec.name, spec.shape, spec.type, at))
        at += -(-spec.nbytes // alignment) * alignment
    return placed


def header(metadata: dict[str, Value], specs: Sequence[Spec], alignment: int = ALIGNMENT) -> bytes:
    """All that comes before the tensors, without the padding.

    Raises:
        FewbitsError: a metadata value does not fit its type.
    """
    parts = [MAGIC, struct.pack("<IQQ", 3, len(specs), len(metadata))]
    for key, value in metadata.items():
        try:
            parts += [_string(key), _value(value)]
        except (struct.error, TypeError, OverflowError, UnicodeEncodeError) as error:
            raise FewbitsError(f"{key} = {value.value!r:.80} does not fit {value.type}: {error}") from None
    for spec in place(specs, alignment):
        parts.append(_string(spec.name) + struct.pack(f"<I{len(spec.shape)}Q", len(spec.shape), *spec.shape[::-1])
                     + struct.pack("<IQ", TYPES[spec.type][0], spec.offset))
    return b"".join(parts)


def write(path: Path, metadata: dict[str, Value], specs: Sequence[Spec], data: Iterable[np.ndarray]) -> None:
    """Write version 3: the header, then `data` (bytes of each tensor, in the order of `specs`) as they come.

    Raises:
        FewbitsError: a metadata value does not fit its type.
    """
    alignment = int(metadata["general.alignment"].value) if "general.alignment" in metadata else ALIGNMENT
    try:
        head = header(metadata, specs, alignment)
    except FewbitsError as error:
        raise FewbitsError(f"{path}: {error}") from None
    with open(path, "wb") as file:
        file.write(head)
        _pad(file, alignment)
        for spec, part in zip(specs, data, strict=True):
            assert part.nbytes == spec.nbytes, (spec, part.nbytes)
            file.write(part.data)
            _pad(file, alignment)


def _pad(file: Any, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))
