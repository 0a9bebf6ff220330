"""Results on disk: found again under the same circumstances, and only then."""

from __future__ import annotations

import math
from pathlib import Path

from fewbits.measure.compare.kept import Kept


def test_a_key_that_changes_is_measured_again(tmp_path: Path) -> None:
    file, calls = tmp_path / "kept.json", []

    def measure() -> list[int]:
        calls.append(1)
        return [len(calls)]

    assert Kept(file).once("what", {"a": 1, "b": (2,)}, measure) == [1]
    assert Kept(file).once("what", {"b": [2], "a": 1}, measure) == [1], "the same key, from the file"
    assert Kept(file).once("other", {"a": 1, "b": (2,)}, measure) == [2]
    assert Kept(file).once("what", {"a": 2}, measure) == [3]
    assert Kept(file).get("what", {"a": 1, "b": (2,)}) is None


def test_an_empty_result_is_one(tmp_path: Path) -> None:
    Kept(tmp_path / "kept.json").put("what", 1, [])
    assert Kept(tmp_path / "kept.json").once("what", 1, lambda: [1]) == []


def test_half_a_file_is_nothing(tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    Kept(file).put("what", 1, {"x": math.nan})
    assert Kept(file).get("what", 1) == {"x": "nan"}
    file.write_text(file.read_text()[:20])
    assert Kept(file).get("what", 1) is None
