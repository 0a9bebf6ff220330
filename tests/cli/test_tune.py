"""`fewbits tune` as a user types it; what it measures is tested in tests/runtime/triton/test_tuning.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewbits.runtime.triton import configs, tuning
from fewbits.runtime.triton.configs import Config, Entry, Key, Tuned
from tests.cli.conftest import Run

FOUND = Tuned("Some GPU", "3.6.0", (Entry(Key("matvec", 4, 128, 1, 64, 256), Config(32, split=2), 12.34),),
              (Key("dense", 4, 128, 96, 64, 256),))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    calls: list[dict] = []

    def tune(shapes, codecs, **more) -> Tuned:
        calls.append({"shapes": shapes, "codecs": [c.name for c in codecs], **more})
        return FOUND

    monkeypatch.setattr(tuning, "tune", tune)
    return calls


def test_shapes_codecs_and_rows_are_read_and_what_was_found_is_said(fewbits: Run, asked: list[dict]) -> None:
    code, text, _ = fewbits("tune", "--shapes", "64x256,32x64", "--codecs", "nf4,Q4_K", "--rows", "1,16",
                            "--device", "cpu", "--again")
    assert code == 0 and "matvec, 1 rows: 12.3 us with n 32, m 1, split 2, warps 4, stages 3" in text
    assert "decoded from 96 rows on" in text and str(configs.own_file("Some GPU")) in text
    call, = asked
    assert call["shapes"] == [(64, 256), (32, 64)] and call["codecs"] == ["nf4", "Q4_K"] and call["rows"] == [1, 16]
    assert call["again"] and call["out"] is None and call["device"].type == "cpu"


def test_json_of_a_models_shapes_into_a_file(fewbits: Run, asked: list[dict], tiny: Path, tmp_path: Path) -> None:
    code, text, _ = fewbits("tune", "--shapes", tiny, "--device", "cpu", "-o", tmp_path / "x.json", "--json")
    found = json.loads(text)
    assert code == 0 and found["file"] == str(tmp_path / "x.json") and found["dense"][0]["rows"] == 96
    assert found["entries"] == configs.to_json(FOUND)["entries"]
    assert set(asked[0]["shapes"]) == {(192, 96), (96, 96), (344, 96), (96, 172)}


@pytest.mark.parametrize("words, error", [
    (("--rows", "0"), "--rows '0'"), (("--rows", "a,1"), "--rows 'a,1'"), (("--codecs", "Q9"), "Q9"),
    (("--shapes", "64*256"), "64*256")])
def test_what_cannot_be_tuned_is_said(fewbits: Run, asked: list[dict], words: tuple[str, str], error: str) -> None:
    code, _, err = fewbits("tune", "--device", "cpu", *words)
    assert code == 1 and error in err and "hint: " in err and not asked


def test_without_a_gpu_there_is_nothing_to_tune(fewbits: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    code, _, err = fewbits("tune", "--device", "cpu")
    assert code == 1 and "nothing to tune: not on cpu" in err and "needs a GPU" in err
