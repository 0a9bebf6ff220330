"""`fewbits imatrix` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run


def test_collects_shows_and_converts(fewbits: Run, tiny: Path, english: Path, tmp_path: Path) -> None:  # noqa: F811
    made = tmp_path / "i.gguf"
    code, out, _ = fewbits("imatrix", tiny, "-o", made, "--calibration", english, "--samples", 3, "--length", 50)
    assert code == 0 and f"{made}: importance matrix of 14 tensors, 3 chunks of 50 tokens, from " in out
    code, out, err = fewbits("imatrix", tiny, "-o", made, "--calibration", english)
    assert code == 1 and "exists already" in err
    code, out, _ = fewbits("imatrix", made, "-o", tmp_path / "i.dat")
    assert code == 0 and "14 tensors" in out
    for command in ("imatrix", "info"):
        for file in (made, tmp_path / "i.dat"):
            code, out, _ = fewbits(command, file, "--json")
            found = json.loads(out)
            assert code == 0 and found["chunks"] == 3 and len(found["tensors"]) == 14
            down = next(t for t in found["tensors"] if t["name"] == "blk.0.ffn_down.weight")
            assert (down["matrices"], down["inputs"]) == (1, 172)


def test_what_goes_wrong(fewbits: Run, tiny: Path, english: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "i.dat").write_bytes(b"no such thing at all")
    cases = [(("imatrix", tiny), "where should its importance matrix go?"),
             (("imatrix", tmp_path / "i.dat"), "neither a GGUF file nor an importance matrix"),
             (("imatrix", tiny, "-o", tmp_path / "no" / "i.gguf", "--calibration", english), "no such directory")]
    for arguments, message in cases:
        code, out, err = fewbits(*arguments)
        assert code == 1 and not out and message in err and len(err.splitlines()) <= 2


def test_a_matrix_is_no_model(fewbits: Run, tiny: Path, english: Path, tmp_path: Path) -> None:  # noqa: F811
    made = tmp_path / "i.gguf"
    fewbits("imatrix", tiny, "-o", made, "--calibration", english, "--samples", 2, "--length", 20)
    code, _, err = fewbits("quantize", made, "-o", tmp_path / "q.gguf", "--to", "Q4_0")
    assert code == 1 and "is an importance matrix, not a model" in err and "--imatrix" in err
