"""`fewbits compare` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run


def test_a_table_and_an_answer(fewbits: Run, tiny: Path,
                               tmp_path: Path, english: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text('base = "Q8_0"\n[tensors]\n"nothing.like.it" = "Q4_0"\n')
    given = (tiny, "--to", f"Q8_0, nf4,{bad}", "--text", english, "--chunks", 2, "--context", 64, "--prompt", 8,
             "--generate", 2, "--repeats", 1, "-o", tmp_path / "out")
    code, out, err = fewbits("compare", *given)
    assert code == 0 and "Take Q8_0." in out and "KL mean" in out and "nf4" in out
    assert "note: bad: not measured" in err and "nothing.like.it" in err
    code, out, _ = fewbits("compare", *given, "--json", "--memory", "1kB")
    found = json.loads(out)
    assert code == 0 and found["advice"][0]["take"] is None and "None fits" in found["advice"][0]["why"]
    timed = next(c for c in found["candidates"] if c["name"] == "Q8_0")["speed"][0]
    assert timed["decode_tokens_per_second"] > 0 and timed["prompt"] == 8


def test_nothing_measured_is_an_error(fewbits: Run, tiny: Path,
                                      tmp_path: Path, english: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF, but not for long")
    code, _, err = fewbits("compare", tiny, "--to", broken, "--text", english, "--chunks", 1, "--context", 64,
                       "--no-speed", "-o", tmp_path / "out")
    assert code == 1 and "error: nothing could be measured" in err and "broken: not measured" in err


def test_what_ends_it_before_the_work(fewbits: Run, tiny: Path,
                                      tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("abc")
    code, _, err = fewbits("compare", tiny, "--to", "Q8_0", "--text", short, "-o", tmp_path / "out")
    assert code == 1 and "short.txt: 3 tokens, one chunk needs" in err and "hint: " in err
    assert not list((tmp_path / "out" / "models").iterdir())
