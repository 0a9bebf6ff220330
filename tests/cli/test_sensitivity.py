"""`fewbits sensitivity` and targets of `fewbits quantize`, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fewbits.cli import application
from fewbits.errors import FewbitsError


def run(*words: str | Path) -> str:
    found = CliRunner().invoke(application(str(words[0])), [str(w) for w in words], catch_exceptions=True)
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.stdout


def test_a_table_or_json(tiny: Path, english: Path) -> None:
    words = ["sensitivity", tiny, "--to", "Q4_0,Q8_0", "--text", english, "--samples", "2", "--length", "64",
             "--estimate"]
    rows = [line.split() for line in run(*words).splitlines()]
    assert rows[1][0] == "model.embed_tokens.weight" and "~" in rows[2][1] and "~" not in rows[1][1]
    losses = json.loads(run(*words, "--json"))["losses"]
    assert {loss["codec"] for loss in losses} == {"Q4_0", "Q8_0"} and all(loss["kl"] > 0 for loss in losses)


def test_a_target_of_a_size(tiny: Path, english: Path, tmp_path: Path) -> None:
    told = json.loads(run("quantize", tiny, "-o", tmp_path / "a.gguf", "--size", "160kB", "--calibration", english,
                          "--solver", "search", "--length", "64", "--json"))
    assert told["nbytes"] <= 160_000 and told["allocation"]["kl"] > 0


def test_one_of_both_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    for words in ([], ["--to", "Q4_0", "--size", "1MB"]):
        with pytest.raises(FewbitsError, match="into what|one of them"):
            run("quantize", tiny, "-o", tmp_path / "a.gguf", *words)
