"""Results that take minutes, kept as JSON lines: a script that is stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Cache:
    """Rows by key (any JSON), one line each; a later line of the same key wins."""

    def __init__(self, path: Path):
        self.path, self.rows = path, dict[str, Row]()
        if path.exists():
            for line in path.read_text().splitlines():
                kept = json.loads(line)
                self.rows[json.dumps(kept["key"], sort_keys=True)] = kept["row"]

    def get(self, key: Row, compute: Callable[[], Row]) -> Row:
        name = json.dumps(key, sort_keys=True)
        if name not in self.rows:
            row = compute()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "row": row}) + "\n")
            self.rows[name] = json.loads(json.dumps(row))
        return self.rows[name]

    def forget(self, which: Callable[[Row], bool]) -> int:
        """Drop the rows whose key `which` says; how many there were."""
        gone = [name for name in self.rows if which(json.loads(name))]
        for name in gone:
            del self.rows[name]
        lines = [json.dumps({"key": json.loads(k), "row": row}) for k, row in self.rows.items()]
        if gone:
            self.path.write_text("".join(line + "\n" for line in lines))
        return len(gone)
