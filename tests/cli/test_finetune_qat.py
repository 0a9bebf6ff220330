"""`fewbits finetune --qat` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run


def test_a_model_is_trained_as_quantized(fewbits: Run, tiny: Path, english: Path, tmp_path: Path) -> None:
    given = ("finetune", tiny, "--data", english, "--qat", "Q4_0", "--steps", 3, "--batch", 1, "--length", 48,
             "--rate", 0.01)
    code, said, err = fewbits(*given, "-o", tmp_path / "a.gguf")
    assert code == 0, err
    assert f"{tmp_path / 'a.gguf'}: Q4_0 (gguf), 3 steps on {english}" in said and "divergence" in said
    assert "note: calibrated on" in err
    code, said, _ = fewbits(*given, "-o", tmp_path / "b.gguf", "--json")
    found = json.loads(said)
    assert code == 0 and found["container"] == "gguf" and found["outcome"]["steps"] == 3 and found["distilled"]
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert {f.name for f in tmp_path.iterdir()} >= {"a.gguf", "a.gguf.loss.json", "b.gguf"}
    code, said, _ = fewbits("finetune", tiny, "--data", english, "--qat", "Q4_0", "--start", tmp_path / "a.gguf",
                            "-o", tmp_path / "c.gguf", "--steps", 1, "--length", 48, "--no-distill")
    assert code == 0 and "loss" in said


def test_what_goes_wrong(fewbits: Run, tiny: Path, english: Path, tmp_path: Path) -> None:
    given = ("finetune", tiny, "--data", english, "-o", tmp_path / "a")
    cases = [(("--start", tiny), "--start is where --qat begins"),
             (("--qat", "int3-g32", "--gguf", tmp_path / "b.gguf"), "--qat int3-g32 makes no adapter"),
             (("--qat", "int3-g32", "--start", tiny), "is transformers, int3-g32 goes to gptq"),
             (("--qat", "int3-g32", "--scales", "any"), "--scales any: no such way"),
             (("--qat", "int1"), "unknown recipe 'int1'")]
    for more, message in cases:
        code, out, err = fewbits(*given, *more)
        assert code == 1 and not out and message in err and len(err.splitlines()) <= 2
