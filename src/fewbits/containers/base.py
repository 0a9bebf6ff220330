"""What a container is, and the one way anything is written: beside, checked, synced, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from fewbits.checkpoint import Checkpoint, Entry
from fewbits.errors import FewbitsError
from fewbits.lazy import torch
from fewbits.qtensor import CHUNK, QTensor

Progress = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)


class Container:
    """Reads and writes one file layout."""

    name: ClassVar[str]
    suffix: ClassVar[str] = ""  # of a file; directories have none
    ordered: ClassVar[bool] = False  # whether a tensor may come with a column order (full act-order)

    def detect(self, path: Path) -> bool:
        """Whether `path` is in this layout; looks at names and magic bytes only."""
        raise NotImplementedError

    def read(self, path: Path) -> Checkpoint:
        """Open `path`; tensors are loaded when asked for, and mapped rather than copied where the layout allows."""
        raise NotImplementedError

    def as_filed(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with the tensors that this layout has: experts apart, for one."""
        return checkpoint

    def accepts(self, checkpoint: Checkpoint, entry: Entry) -> str | None:
        """Why this layout cannot hold the entry of that checkpoint (both `as_filed`), or None."""
        raise NotImplementedError

    def refuses(self, checkpoint: Checkpoint, entry: Entry) -> str | None:
        """`accepts` of an entry that is not yet filed."""
        try:
            filed = self.as_filed(replace(checkpoint, entries={entry.name: entry}))
        except FewbitsError as error:
            return str(error)
        return next((reason for e in filed.entries.values() if (reason := self.accepts(checkpoint, e))), None)

    def refusal(self, checkpoint: Checkpoint) -> tuple[Entry, str] | None:
        """The first entry that this layout cannot hold, and why."""
        filed = self.as_filed(checkpoint)
        reasons = ((entry, self.accepts(filed, entry)) for entry in filed.entries.values())
        return next(((entry, reason) for entry, reason in reasons if reason), None)

    def meant(self, checkpoint: Checkpoint) -> Checkpoint:
        """What the checkpoint should read back as, where the layout itself rounds or leaves out."""
        return checkpoint

    def stage(self, path: Path, checkpoint: Checkpoint, progress: Progress | None) -> None:
        """Write the whole checkpoint to the fresh name `path`, tensor by tensor."""
        raise NotImplementedError


def write(container: Container, path: Path, checkpoint: Checkpoint, progress: Progress | None = None) -> Checkpoint:
    """Write `checkpoint` to `path` and return it as read back.

    The data goes to a name beside, is read back, decoded and compared with what was meant, synced, and only then
    renamed; on any failure, Ctrl-C included, nothing is left behind.

    Raises:
        FewbitsError: output and input are the same, `path` exists, too little disk space, a tensor the container cannot
            hold, or a file that does not read back as it was meant.
    """
    path = path.resolve()
    check_output(path, checkpoint.path)
    refusal = container.refusal(checkpoint)
    if refusal:
        entry, reason = refusal
        raise FewbitsError(f"{container.name} cannot hold {entry.name} ({entry.codec.name}): {reason}")
    check_space(path.parent, checkpoint.nbytes)
    partial = path.with_name(f".{path.name}.partial{container.suffix}")
    remove(partial)
    try:
        container.stage(partial, checkpoint, progress)
        compare(container.read(partial), container.meant(checkpoint), progress)
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        remove(partial)
        raise
    return container.read(path)


def check_output(path: Path, source: Path | None) -> None:
    """Refuse an output that is the input, that lies inside it, or that exists already."""
    if source is not None and (path == source.resolve() or source.resolve() in path.parents):
        raise FewbitsError(f"{path}: output and input are the same", "give another name with -o")
    if path.exists():
        raise FewbitsError(f"{path}: exists already", "remove it, or give another name with -o")
    if not path.parent.is_dir():
        raise FewbitsError(f"{path.parent}: no such directory", "create it first")


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise FewbitsError(f"{folder}: {needed_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
                           "free some space, or write to another disk")


def compare(got: Checkpoint, meant: Checkpoint, progress: Progress | None = None) -> None:
    """Decode every tensor of both and demand equal values (NaN equal to NaN)."""
    missing = meant.entries.keys() - got.entries.keys()
    if missing:
        raise FewbitsError(f"{got.path}: reads back without {sorted(missing)[0]} ({len(missing)} tensors missing)")
    done, total = 0, meant.nbytes
    for name, entry in meant.entries.items():
        if progress:
            progress("checking", done, total)
        a, b = got.entries[name].load(), entry.load()
        if a.shape != b.shape or not _equal(a, b):
            raise FewbitsError(f"{got.path}: {name} reads back with other values than were written",
                               "this is a bug in fewbits: please report it")
        done += entry.nbytes


def _equal(a: QTensor, b: QTensor) -> bool:
    same_planes = a.codec == b.codec and a.planes.keys() == b.planes.keys() and _same_order(a.order, b.order)
    if same_planes and all(_same_bytes(flat_bytes(a.planes[k]), flat_bytes(b.planes[k])) for k in a.planes):
        return True
    if len(a.shape) < 2 or not (a.codec.rows_apart(a.shape) and b.codec.rows_apart(b.shape)):
        return _same_values(a.dequantize(), b.dequantize())
    rows, step = a.codec.matrix(a.shape)[0], max(1, 2 * CHUNK // a.shape[-1])
    return all(_same_values(a.part(slice(i, i + step)).dequantize(), b.part(slice(i, i + step)).dequantize())
               for i in range(0, rows, step))


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """By eight, which is several times as fast as torch's comparison of bytes."""
    if len(a) != len(b):
        return False
    whole = len(a) // 8 * 8
    first, second = a.numpy(), b.numpy()
    return (np.array_equal(first[:whole].view(np.int64), second[:whole].view(np.int64))
            and np.array_equal(first[whole:], second[whole:]))


def _same_order(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, flat. A single element may have any stride, at which torch refuses to view bytes."""
    flat = tensor.contiguous().view(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)


def _same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.equal(a, b) or ((a == b) | (a.isnan() & b.isnan())).all())


def sync(path: Path) -> None:
    """fsync a file, or every file of a directory, then the directory that holds it."""
    for file in (sorted(path.rglob("*")) if path.is_dir() else [path]):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
