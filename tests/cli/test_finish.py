"""`fewbits finish`, and `--finish`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewbits import finishing
from tests.cli.conftest import Run


def test_a_file_is_finished(fewbits: Run, tiny: Path, english: Path, tmp_path: Path,  # noqa: F811
                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(finishing.STEPS, "quick", 8)
    plain, out = tmp_path / "plain.gguf", tmp_path / "out.gguf"
    fewbits("quantize", tiny, "-o", plain, "--to", "Q4_0", "--calibration", "none")
    given = ("finish", plain, "--original", tiny, "--calibration", english, "--length", 64)
    code, said, err = fewbits(*given, "-o", out)
    assert code == 0 and f"{out}: gguf, tuned on {english}, 9 x 64 tokens" in said
    assert "finished (quick, 8 steps): divergence on held-out text" in err
    assert out.stat().st_size == plain.stat().st_size and not list(tmp_path.glob(".*"))
    code, said, _ = fewbits(*given, "-o", tmp_path / "again.gguf", "--json")
    assert code == 0 and json.loads(said)["container"] == "gguf"
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()


def test_what_goes_wrong(fewbits: Run, tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    cases = [(("finish", tiny, "--original", tiny, "-o", tmp_path / "a", "--level", "slow"), "no such level"),
             (("finish", tiny, "--original", tiny, "-o", tmp_path / "a", "--level", "off"), "leaves the file as it is"),
             (("finish", tiny, "--original", tiny, "-o", tmp_path / "a"), "nothing in it can be tuned"),
             (("quantize", tiny, "-o", tmp_path / "a", "--to", "nf4", "--finish", "slow"), "no such level")]
    for arguments, message in cases:
        code, out, err = fewbits(*arguments)
        assert code == 1 and not out and message in err and len(err.splitlines()) <= 2
