"""One model in several GGUF files, `NAME-00001-of-00003.gguf`: found by any of them, written as a folder of them.

The first file has all metadata; every one says its number (`split.no`, from 0), how many there are (`split.count`) and
how many tensors they hold together (`split.tensors.count`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from fewbits.containers import gguf_file
from fewbits.containers.gguf_file import ALIGNMENT, GgufFile, Spec, Value
from fewbits.errors import FewbitsError

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
KEYS = (NUMBER, COUNT, TENSORS)
NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
STEM = "model"  # of the files that are written
MOST = 65535  # files: their number has 16 bits


# reading ------------------------------------------------------------------------------------------------------------
def locate(path: Path) -> Path:
    """`path`, or the first of the files if it is a folder that holds one split model.

    Raises:
        FewbitsError: a folder with the files of several models, or of none.
    """
    if not path.is_dir():
        return path
    found = heads(path)
    if len(found) != 1:
        names = ", ".join(sorted(f.name for f in found)) or "none"
        raise FewbitsError(f"{path}: the first file of one split GGUF model is expected, and there are {names}",
                           "name the file")
    return found[0]


def heads(folder: Path) -> list[Path]:
    """The lowest numbered file of each split model in a folder."""
    lowest: dict[tuple[str, str], Path] = {}
    for file in sorted(folder.glob("*-of-*.gguf")):
        match = NAME.fullmatch(file.name)
        if match:
            lowest.setdefault((match[1], match[3]), file)
    return list(lowest.values())


def read(path: Path) -> GgufFile:
    """Open a GGUF file; one of several is opened together with the others beside it.

    Raises:
        FewbitsError: what `gguf_file.read` refuses, a file that is missing, or files that do not belong together.
    """
    first = gguf_file.read(locate(path))
    count = _number(first, COUNT)
    if count in (None, 0, 1):
        return replace(first, path=path)
    parts = [_part(first, file, i, count) for i, file in enumerate(_names(first, count))]
    tensors: dict[str, Spec] = {}
    for part in parts:
        for name, spec in part.tensors.items():
            if name in tensors:
                raise FewbitsError(f"{part.path}: tensor {name!r} is in another file of the model too")
            tensors[name] = spec
    for part in parts:
        total = _number(part, TENSORS)
        if total is not None and total != len(tensors):
            raise FewbitsError(f"{part.path}: {TENSORS} is {total}, and the {count} files have {len(tensors)}",
                               "they are not all of one model: fetch them again")
    metadata = {k: v for k, v in parts[0].metadata.items() if k not in KEYS}
    return replace(parts[0], path=path, metadata=metadata, tensors=tensors, parts=tuple(parts))


def _number(file: GgufFile, key: str) -> int | None:
    value = file.metadata.get(key)
    if value is None:
        return None
    if "INT" not in value.type or value.value < 0:
        raise FewbitsError(f"{file.path}: {key} is {value.value!r} ({value.type}); a count is expected")
    return int(value.value)


def _names(file: GgufFile, count: int) -> list[Path]:
    """All files of the model that `file` is one of."""
    if count > MOST:
        raise FewbitsError(f"{file.path}: {COUNT} is {count}; at most {MOST} are possible")
    match, number = NAME.fullmatch(file.path.name), _number(file, NUMBER) or 0
    if not match or (int(match[2]) - 1, int(match[3])) != (number, count):
        raise FewbitsError(f"{file.path}: is file {number + 1} of the {count} of a split model, and not called so",
                           f"its name has to end in -{number + 1:05}-of-{count:05}.gguf")
    return [file.path.with_name(part_name(match[1], i, count)) for i in range(count)]


def part_name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number + 1:05}-of-{count:05}.gguf"


def _part(first: GgufFile, path: Path, number: int, count: int) -> GgufFile:
    if path == first.path:
        return first
    if not path.is_file():
        raise FewbitsError(f"{path}: is missing, one of the {count} files of {first.path.name}", "fetch it too")
    part = gguf_file.read(path)
    if (_number(part, NUMBER), _number(part, COUNT)) != (number, count):
        raise FewbitsError(f"{path}: says it is file {_number(part, NUMBER)} of {_number(part, COUNT)}, counted from "
                           f"0; {number} of {count} is expected", "it belongs to another model: fetch it again")
    return part


# writing ------------------------------------------------------------------------------------------------------------
def keys(number: int, count: int, tensors: int) -> dict[str, Value]:
    """The three metadata values, with the types that llama.cpp gives them."""
    return {NUMBER: Value("UINT16", number), COUNT: Value("UINT16", count), TENSORS: Value("INT32", tensors)}


def split(metadata: dict[str, Value], specs: list[Spec], most_bytes: int | None,
          most_tensors: int | None) -> list[list[Spec]]:
    """The tensors of each file, in order, with as few files as keep to `most_bytes` and `most_tensors` each.

    The first file may stay without tensors where metadata leave no room for one.

    Raises:
        FewbitsError: the metadata or a tensor alone take more than `most_bytes`, or there would be too many files.
    """
    groups: list[list[Spec]] = [[]]
    own = len(gguf_file.header(metadata | keys(0, 1, len(specs)), []))
    others = len(gguf_file.header(keys(0, 1, len(specs)), []))
    if most_bytes is not None and _aligned(own) > most_bytes:
        raise FewbitsError(f"files of {most_bytes} bytes are too small: the metadata take {_aligned(own)}",
                           "allow more bytes a file")
    head, data = own, 0
    for spec in specs:
        record, size = len(gguf_file.header({}, [spec])) - len(gguf_file.header({}, [])), _aligned(spec.nbytes)
        too_big = most_bytes is not None and _aligned(head + record) + data + size > most_bytes
        if too_big or len(groups[-1]) == most_tensors:
            groups.append([])
            head, data = others, 0
            if most_bytes is not None and _aligned(head + record) + size > most_bytes:
                raise FewbitsError(f"files of {most_bytes} bytes are too small: {spec.name} takes {size}",
                                   "allow more bytes a file")
        groups[-1].append(spec)
        head, data = head + record, data + size
    if len(groups) > MOST:
        raise FewbitsError(f"{len(groups)} files are too many; {MOST} are possible", "allow more bytes a file")
    return groups


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def write(folder: Path, metadata: dict[str, Value], groups: list[list[Spec]], data: Iterator[np.ndarray]) -> None:
    """Write `folder` with a file for each group; `data` are the bytes of all tensors in order."""
    folder.mkdir()
    total = sum(map(len, groups))
    for i, group in enumerate(groups):
        path = folder / part_name(STEM, i, len(groups))
        gguf_file.write(path, (metadata if i == 0 else {}) | keys(i, len(groups), total), group,
                        islice(data, len(group)))
