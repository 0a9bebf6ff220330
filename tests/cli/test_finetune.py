"""`fewbits finetune` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run


def test_an_adapter_is_trained(fewbits: Run, tiny: Path, english: Path, tmp_path: Path) -> None:
    given = ("finetune", tiny, "--base", "nf4", "--data", english, "--steps", 2, "--length", 32, "--rank", 4,
             "--targets", "q_proj,v_proj", "-o")
    code, said, _ = fewbits(*given, tmp_path / "a")
    assert code == 0 and f"{tmp_path / 'a'}: adapter of 2560 parameters for {tiny}, 2 steps on" in said
    code, said, _ = fewbits(*given, tmp_path / "b", "--json", "--gguf", tmp_path / "b.gguf")
    found = json.loads(said)
    assert code == 0 and found["outcome"]["steps"] == 2 and len(found["outcome"]["losses"]) == 2
    assert (tmp_path / "b.gguf").read_bytes()[:4] == b"GGUF"
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_goes_wrong(fewbits: Run, tiny: Path, english: Path, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text('{"label": 1}\n')
    given = ("finetune", tiny, "-o", tmp_path / "a", "--length", 32, "--steps", 1, "--data")
    cases = [((*given, tmp_path / "none.jsonl"), "no text to learn from: it holds label"),
             ((*given, english, "--optimizer", "paged_adamw_8bit"), "--optimizer paged_adamw_8bit: "),
             ((*given, english, "--base", "nf5"), "nf5"),
             ((*given, english, "--adapter", tmp_path), "no adapter_config.json in it")]
    for arguments, message in cases:
        code, out, err = fewbits(*arguments)
        assert code == 1 and not out and message in err and "Traceback" not in err
