"""SHA-256 of a model's files, in the format of sha256sum; of the tensors of GGUF files too.

    <64 hexadecimal digits>  model.gguf
    # <64 hexadecimal digits>  model.gguf:blk.0.attn_q.weight

Names are relative to the model's folder, where `sha256sum -c` reads the list; lines of tensors are comments to it. They
stay the same when metadata change, as llama.cpp's llama-gguf-hash prints them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from fewbits.checkpoint import Checkpoint
from fewbits.checks import Finding, error, warning
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError

STEP = 1 << 22  # bytes read at a time
_LINE = re.compile(r"(# )?\\?([0-9a-f]{64}) [ *](?:\./)?(.+)", re.IGNORECASE)


def files_of(path: Path, checkpoint: Checkpoint | None) -> list[Path]:
    """The files of a model: one, all parts of a split one, or those right in its folder."""
    parts = checkpoint.facts.get("parts") if checkpoint else None
    if parts:
        return sorted(Path(part) for part in parts)
    return sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]


def of_files(files: Collection[Path], progress: Progress | None = None) -> dict[str, str]:
    """Name -> SHA-256."""
    done, total = 0, sum(f.stat().st_size for f in files)
    out = {}
    for file in files:
        digest = hashlib.sha256()
        with open(file, "rb") as data:
            while part := data.read(STEP):
                digest.update(part)
                done += len(part)
                if progress:
                    progress("hashing", done, total)
        out[file.name] = digest.hexdigest()
    return out


def of_tensors(path: Path) -> dict[str, str]:
    """`file:tensor` -> SHA-256 of the bytes that a GGUF file holds of it."""
    from fewbits.containers import gguf_split

    file = gguf_split.read(path)
    return {f"{part.path.name}:{spec.name}": hashlib.sha256(part.data(spec).data).hexdigest()
            for part in file.parts or (file,) for spec in part.tensors.values()}


def text(files: dict[str, str], tensors: dict[str, str]) -> str:
    """The list as it is written."""
    return "".join([f"{digest}  {name}\n" for name, digest in files.items()]
                   + [f"# {digest}  {name}\n" for name, digest in tensors.items()])


def read(path: Path) -> dict[str, str]:
    """The list at `path`, as sha256sum or `text` wrote it; tensors by `file:tensor`.

    Raises:
        FewbitsError: no file, or no such list.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as problem:
        raise FewbitsError(f"{path}: cannot be read: {problem}") from None
    found = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line.strip())
        if match:
            found[match[3]] = match[2].lower()
        elif line.strip() and not line.startswith("#"):
            raise FewbitsError(f"{path}: line {number} is no checksum: {line[:80]!r}",
                               "lines are those of sha256sum: 64 hexadecimal digits, two spaces, a name")
    if not found:
        raise FewbitsError(f"{path}: holds no checksums")
    return found


def compare(known: dict[str, str], files: dict[str, str], tensors: dict[str, str]) -> Iterator[Finding]:
    """What differs from the list `known`, and what only one of both has. Other folders than the model's are left out
    of names."""
    plain = {name.replace("\\", "/").rpartition("/")[2]: digest for name, digest in known.items()}
    for name, digest in (files | tensors).items():
        if name not in plain:
            if name in files:
                yield warning(name, "is not in the list of checksums")
        elif plain[name] != digest:
            yield error(name, f"has the checksum {digest}; {plain[name]} is expected")
    for name in plain.keys() - files.keys() - tensors.keys():
        yield error(name, "is in the list of checksums and not here")
