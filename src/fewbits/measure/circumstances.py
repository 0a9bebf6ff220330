"""What is needed to repeat a measurement: machine, versions, and which model exactly."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from fewbits import caching, instructions
from fewbits.checkpoint import Checkpoint
from fewbits.checks import checksums

PACKAGES = ("fewbits", "torch", "transformers", "tokenizers", "numpy", "gguf", "lm_eval", "triton")


def circumstances(*models: Checkpoint, **settings: Any) -> dict[str, Any]:
    """All of it, as JSON: `settings` are the measurement's own (text, seed, kernel …)."""
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": machine(),
            "versions": versions(), "models": [identity(m) for m in models], **settings}


def machine() -> dict[str, Any]:
    """Processor, cores, threads of a native call, memory, graphics processor, operating system."""
    return {"processor": _processor(), "cores": os.cpu_count(), "threads": instructions.threads(),
            "instructions": instructions.current(), "memory_bytes": _memory(), "gpu": _gpu(),
            "system": platform.platform(terse=True), "python": platform.python_version()}


def versions() -> dict[str, str]:
    """Of the packages that compute, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """A model's name, format, bytes and SHA-256 (None of a model that no file holds), and how it was quantized where a
    summary beside it tells."""
    path = Path(checkpoint.path)
    found: dict[str, Any] = {"name": path.name, "format": checkpoint.container, "bytes": None, "sha256": None}
    if path.exists():
        files = checksums.files_of(path, checkpoint)
        found |= {"bytes": sum(f.stat().st_size for f in files), "sha256": digest(files)}
    summary = path.with_name(f"{path.name}.quantization.json")
    if summary.is_file():
        told = json.loads(summary.read_text(encoding="utf-8"))
        solvers = {row.get("solver") for row in told.get("tensors", ())} - {None}
        found |= {key: told[key] for key in ("recipe", "calibration") if told.get(key)} | {"solvers": sorted(solvers)}
    return found


def digest(files: list[Path]) -> str:
    """One SHA-256 of several files' names and contents; that of a file that hasn't changed is remembered."""
    memory, key = caching.folder("hashes"), hashlib.sha256()
    for file in files:
        stat = file.stat()
        key.update(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    known = memory / key.hexdigest()
    if known.exists():
        return known.read_text()
    whole = hashlib.sha256()
    for name, found in checksums.of_files(files).items():
        whole.update(f"{name} {found}\n".encode())
    caching.write(known, lambda out: out.write(whole.hexdigest().encode()))
    return whole.hexdigest()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _gpu() -> str | None:
    torch = sys.modules.get("torch")  # whoever computes on one has imported it
    return torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
