"""What a result says of the model and the machine."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import fewbits
from fewbits import caching, containers
from fewbits.measure import circumstances as told


def test_a_model_is_known_by_its_content(tiny: Path, tmp_path: Path) -> None:
    same, other = shutil.copytree(tiny, tmp_path / "same"), shutil.copytree(tiny, tmp_path / "other")
    with open(other / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    one, two, three = (told.identity(containers.open(p)) for p in (tiny, same, other))
    assert one["sha256"] == two["sha256"] != three["sha256"]
    assert one["bytes"] == sum(f.stat().st_size for f in tiny.iterdir())
    listed = "".join(f"{f.name} {hashlib.sha256(f.read_bytes()).hexdigest()}\n" for f in sorted(tiny.iterdir()))
    assert one["sha256"] == hashlib.sha256(listed.encode()).hexdigest()


def test_a_hash_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"one")
    first = told.digest([file])
    for memory in caching.folder("hashes").iterdir():
        if memory.read_text() == first:
            memory.write_text("remembered")
    assert told.digest([file]) == "remembered"
    file.write_bytes(b"longer")
    assert told.digest([file]) == hashlib.sha256(
        f"model.bin {hashlib.sha256(b'longer').hexdigest()}\n".encode()).hexdigest()


def test_how_a_file_was_quantized_is_told(tiny: Path, tmp_path: Path) -> None:
    out = fewbits.quantize(tiny, tmp_path / "q.gguf", "Q8_0", solver="nearest", calibration="none").path
    found = told.circumstances(containers.open(out), text="some.txt", seed=3)
    assert found["models"][0]["recipe"] == "Q8_0" and "nearest" in found["models"][0]["solvers"]
    assert found["text"] == "some.txt" and found["seed"] == 3
    assert found["versions"]["fewbits"] == fewbits.__version__ and found["machine"]["threads"] >= 1
    json.dumps(found)


def test_the_cache_is_where_it_is_said(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "here"))
    assert caching.folder("a", "b") == tmp_path / "here" / "a" / "b" and (tmp_path / "here/a/b").is_dir()
