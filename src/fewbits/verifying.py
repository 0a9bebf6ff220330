"""Is a model whole and sound? Structure, shapes, vocabulary, every value, checksums."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewbits import arch, containers, hub
from fewbits.checkpoint import Checkpoint
from fewbits.checks import Finding, checksums, error, shapes, values, vocabulary, warning
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError


@dataclass(frozen=True)
class Verification:
    """What was found. `sha256` is by file name, `tensor_sha256` by `file:tensor`, of GGUF files only."""

    path: Path
    container: str  # empty where no container reads it
    architecture: str
    tensors: int
    parameters: int
    nbytes: int  # of all files
    findings: list[Finding]
    sha256: dict[str, str]
    tensor_sha256: dict[str, str]
    seconds: float

    @property
    def errors(self) -> int:
        return sum(f.level == "error" for f in self.findings)

    @property
    def warnings(self) -> int:
        return len(self.findings) - self.errors

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings are allowed."""
        return not self.errors

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "ok": self.ok}


def verify(model: str | Path, *, decode: bool = True, checksum_file: str | Path | None = None,
           against: str | Path | None = None, progress: Progress | None = None) -> Verification:
    """Check `model`, a path in any format or a hub id; the result lists what is wrong.

    `decode` looks at every value (without it only names, shapes and files are, and torch isn't imported);
    `checksum_file` is written with the list of checksums, `against` is such a list to compare with.

    Raises:
        FewbitsError: nothing is there, or a list of checksums cannot be read or written.
    """
    began = time.monotonic()
    path = hub.locate(model)
    known = checksums.read(Path(against)) if against is not None else {}
    checkpoint, findings = _open(path)
    if checkpoint:
        if arch.lookup(checkpoint.config) or checkpoint.container != "gguf":
            findings += shapes.check(checkpoint)
        findings += vocabulary.check(checkpoint)
        if decode:
            findings += _values(checkpoint, progress)
    lists = {Path(f).resolve() for f in (checksum_file, against) if f is not None}
    files = [f for f in checksums.files_of(path, checkpoint) if f.resolve() not in lists]
    sha256 = checksums.of_files(files, progress)
    tensors = checksums.of_tensors(path) if checkpoint and checkpoint.container == "gguf" else {}
    if known:
        findings += checksums.compare(known, sha256, tensors)
    if checksum_file is not None:
        Path(checksum_file).write_text(checksums.text(sha256, tensors), encoding="utf-8")
    return Verification(path, checkpoint.container if checkpoint else "", checkpoint.architecture if checkpoint else "",
                        len(checkpoint.entries) if checkpoint else 0, checkpoint.parameters if checkpoint else 0,
                        sum(f.stat().st_size for f in files), findings, sha256, tensors, time.monotonic() - began)


def _open(path: Path) -> tuple[Checkpoint | None, list[Finding]]:
    """The checkpoint, and why it is not all that it should be. A GGUF file that no family takes is opened as it is."""
    try:
        return containers.open(path), []
    except FewbitsError as problem:
        reason = str(problem).removeprefix(f"{path}: ")
    except RecursionError:
        reason = "JSON that is nested too deeply"
    if containers.by_name("gguf").detect(path):
        from fewbits.containers import gguf, gguf_split

        try:
            file = gguf_split.read(path)
            name = file.metadata.get("general.architecture")
            unknown = name is not None and arch.by_gguf(str(name.value)) is None
            entries = gguf.bare_entries(file)
        except FewbitsError:
            return None, [error(path.name, reason)]
        config = {"architectures": [str(name.value)] if name else []}
        bare = Checkpoint(path, "gguf", config, entries, {}, {"parts": [part.path for part in file.parts] or None})
        return bare, [warning(path.name, f"only its tensors are checked: {reason}") if unknown
                      else error(path.name, reason)]
    return None, [error(path.name, reason)]


def _values(checkpoint: Checkpoint, progress: Progress | None) -> Iterator[Finding]:
    done, total = 0, checkpoint.nbytes
    for entry in checkpoint.entries.values():
        yield from values.check(entry)
        done += entry.nbytes
        if progress:
            progress("decoding", done, total)
