"""Where fewbits keeps what it measured, so that it need not measure it again."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def folder(*names: str) -> Path:
    """A folder of the user's cache, made if it isn't there; anything in it may be deleted at any time.

    `FEWBITS_CACHE` names another place than the system's usual one.
    """
    found = _root().joinpath(*names)
    found.mkdir(parents=True, exist_ok=True)
    return found


def write(file: Path, fill: Callable[[BinaryIO], object]) -> None:
    """What `fill` writes becomes `file` when it is complete."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.part")
    with open(partial, "wb") as out:
        fill(out)
    os.replace(partial, file)


def _root() -> Path:
    if said := os.environ.get("FEWBITS_CACHE"):
        return Path(said)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fewbits"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fewbits"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbits"
