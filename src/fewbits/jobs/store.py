"""Solved tensors on disk, so that a killed run goes on where it stopped.

A tensor is a safetensors file of its planes; what is known of the solving (solver, error, seconds) is in the file's
metadata. A file is complete and synced once it has its name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save

from fewbits.checkpoint import Checkpoint
from fewbits.codecs.base import Codec
from fewbits.containers.base import remove, sync
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor

ORDER = "order"  # no codec has a plane of this name


class Store:
    """A folder of solved tensors that belongs to one job: what another job left there is removed."""

    def __init__(self, folder: Path, job: dict[str, Any]):
        self.folder = folder
        stamp = folder / "job.json"
        text = json.dumps(job, sort_keys=True)
        if not stamp.exists() or stamp.read_text() != text:
            remove(folder)
            folder.mkdir()
            self._write(stamp, text.encode())

    def _write(self, file: Path, data: bytes) -> None:
        partial = file.with_suffix(".partial")
        partial.write_bytes(data)
        sync(partial)
        os.replace(partial, file)  # a name that is lost with the power is one tensor to solve again

    def _file(self, name: str) -> Path:
        return self.folder / (hashlib.sha256(name.encode()).hexdigest()[:24] + ".safetensors")

    def has(self, name: str) -> bool:
        return self._file(name).exists()

    def put(self, name: str, q: QTensor, record: dict[str, Any]) -> None:
        """Keep `q` and what is known of it (JSON)."""
        planes = q.planes if q.order is None else {**q.planes, ORDER: q.order}
        data = save({k: p.contiguous() for k, p in planes.items()}, {"record": json.dumps(record)})
        self._write(self._file(name), data)

    def get(self, name: str, codec: Codec, shape: tuple[int, ...]) -> QTensor:
        planes = load_file(self._file(name))
        order = planes.pop(ORDER, None)
        return QTensor(codec, shape, planes, order)

    def record(self, name: str) -> dict[str, Any]:
        with safe_open(self._file(name), "pt") as file:
            return json.loads(file.metadata()["record"])

    def write(self, name: str, data: bytes) -> None:
        """Keep anything under a name of its own."""
        self._write(self._file(name), data)

    def read(self, name: str) -> bytes | None:
        return self._file(name).read_bytes() if self.has(name) else None

    @property
    def log_file(self) -> Path:
        return self.folder / "log.jsonl"

    def log(self, **event: Any) -> None:
        """One more line of the log, with the time."""
        with open(self.log_file, "a", encoding="utf-8") as out:
            out.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **event}, ensure_ascii=False) + "\n")

    def clear(self) -> None:
        remove(self.folder)


def identity(source: Checkpoint) -> list[Any]:
    """What tells a checkpoint's files from others, and from themselves once changed."""
    stat = source.path.stat()
    return [str(source.path), stat.st_size, stat.st_mtime_ns]


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """A full disk or memory becomes one line that says how to go on; `folder` is where solved tensors are kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise FewbitsError(f"{error.filename or folder.parent}: the disk is full; what was solved is kept in {folder}",
                           "free some space: the same command resumes") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("allocate|out of memory", str(error)):
            raise
        raise FewbitsError(f"out of memory; what was solved is kept in {folder}",
                           "free some memory: the same command resumes") from error
