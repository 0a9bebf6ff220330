"""Answers on disk: a run that was killed goes on, one that is repeated asks nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fewbits.measure.tasks.endings import Likelihood


class Answers:
    """One model's, by the key of the question: a line of JSON each; nothing is kept without a file."""

    def __init__(self, file: Path | None):
        self._file, self._known = file, dict[str, list[Likelihood]]()
        if file is None or not file.exists():
            return
        lines = file.read_bytes().split(b"\n")
        if lines[-1]:  # a run was killed while it wrote
            with open(file, "ab") as out:
                out.write(b"\n")
        for line in lines[:-1]:
            try:
                row = json.loads(line)
            except ValueError:  # where it was killed
                continue
            self._known[row["question"]] = [(float(one), bool(greedy)) for one, greedy in row["likelihoods"]]

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> list[Likelihood]:
        return self._known[key]

    def put(self, key: str, found: Sequence[Likelihood]) -> None:
        self._known[key] = list(found)
        if self._file is not None:
            with open(self._file, "a", encoding="utf-8") as out:
                out.write(json.dumps({"question": key, "likelihoods": list(found)}) + "\n")
