"""Results on disk, each with what decided it: asked again under the same circumstances, nothing is measured again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewbits.measure.compare.candidates import plain


class Kept:
    """One JSON file of results by name, `{"quality": {"key": …, "value": …}}`; written anew, whole, with each."""

    def __init__(self, file: Path):
        self.file = file
        try:
            self.found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or no JSON: then nothing is known
            self.found = {}

    def get(self, what: str, key: Any) -> Any | None:
        """The result `what`, if it was decided by `key`; else None."""
        kept = self.found.get(what)
        return kept["value"] if kept and kept["key"] == digest(key) else None

    def put(self, what: str, key: Any, value: Any) -> Any:
        """Keep a result; returns it as it will be read."""
        self.found[what] = {"key": digest(key), "value": plain(value)}
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, self.file)
        return self.found[what]["value"]

    def once(self, what: str, key: Any, measure: Callable[[], Any]) -> Any:
        """The result `what` decided by `key`, measured if it isn't known."""
        known = self.get(what, key)
        return self.put(what, key, measure()) if known is None else known


def digest(key: Any) -> str:
    """SHA-256 of what decides a result: anything that JSON can hold."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
