"""Where fewbits keeps what it measured, so that it need not measure it again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def folder(*names: str) -> Path:
    """A folder of the user's cache, made if it isn't there; anything in it may be deleted at any time.

    `FEWBITS_CACHE` names another place than the system's usual one.
    """
    found = _root().joinpath(*names)
    found.mkdir(parents=True, exist_ok=True)
    return found


def _root() -> Path:
    if said := os.environ.get("FEWBITS_CACHE"):
        return Path(said)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fewbits"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fewbits"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbits"
