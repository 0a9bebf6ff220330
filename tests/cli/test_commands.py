"""Every command as a user types it: data on stdout, one-line errors with a hint on stderr, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewbits.cli.common import nbytes
from fewbits.errors import FewbitsError
from tests.cli.conftest import Run


def test_the_way_of_a_model(fewbits: Run, tiny: Path, tmp_path: Path, english: Path) -> None:
    out = tmp_path / "q.gguf"
    code, text, err = fewbits("quantize", tiny, "-o", out, "--to", "Q8_0")
    assert code == 0 and str(out) in text and "bits a weight" in text
    assert "172" in err, "the fallback of the width that 32 does not divide is told"
    code, text, _ = fewbits("info", out, "--json")
    assert code == 0 and json.loads(text)["container"] == "gguf"
    code, text, _ = fewbits("info", out, "--tensors")
    assert code == 0 and "model.layers.1.mlp.up_proj.weight" in text.replace("\n", "")
    measure = ("eval", out, "--against", tiny, "--perplexity", english, "--context", 64)
    code, text, _ = fewbits(*measure, "--chunks", 2, "--json")
    found = json.loads(text)
    assert code == 0 and 0 < found["kl_mean"] < 0.05 and found["tokens"] == 126
    code, text, _ = fewbits(*measure, "--chunks", 1)
    assert code == 0 and "KL divergence" in text
    code, text, _ = fewbits("run", out, "Hello", "--max-tokens", 5, "--json")
    answer = json.loads(text)
    assert code == 0 and len(answer["tokens"]) <= 5
    code, again, _ = fewbits("run", out, "Hello", "--max-tokens", 5)
    assert code == 0 and again.strip() == answer["text"].strip()


def test_quantize_json(fewbits: Run, tiny: Path, tmp_path: Path) -> None:
    code, text, _ = fewbits("quantize", tiny, "-o", tmp_path / "q", "--to", "nf4", "--json",
                            "--override", "*.v_proj.weight=nf4-b32")
    found = json.loads(text)
    assert code == 0 and found["container"] == "bitsandbytes"
    assert {t["codec"] for t in found["tensors"] if "v_proj" in t["name"]} == {"nf4-b32"}


def test_chat(fewbits: Run, tiny: Path) -> None:
    code, text, _ = fewbits("chat", tiny, "--max-tokens", 3, stdin="Hello\nAgain\n\n")
    assert code == 0 and text.count("\n") >= 2


def test_plan(fewbits: Run, tiny: Path) -> None:
    code, text, _ = fewbits("plan", tiny, "--memory", "100MB", "--context", 64)
    assert code == 0 and "take " in text and "Q8_0" in text
    code, text, _ = fewbits("plan", tiny, "--memory", "1MB", "--json")
    assert code == 0 and json.loads(text)["memory_bytes"] == 10**6


@pytest.mark.parametrize("arguments,error,hint", [
    (("info", "no/such/place/at/all"), "no such file or directory", "give a path"),
    (("quantize", "{tiny}", "-o", "{tmp}/q", "--to", "Q9_X"), "unknown recipe 'Q9_X'", "Q4_K_M"),
    (("quantize", "{tiny}", "-o", "{tiny}", "--to", "nf4"), "output and input are the same", "another name"),
    (("quantize", "{tiny}", "-o", "{tmp}/q", "--to", "nf4", "--solver", "magic"), "unknown solver 'magic'", "search"),
    (("quantize", "{tiny}", "-o", "{tmp}/q", "--to", "int4", "--solver", "gptq"), "needs calibration text",
     "--calibration"),
    (("quantize", "{tiny}", "-o", "{tmp}/q", "--to", "Q8_0", "--override", "nothing*=f16"), "nothing*", ""),
    (("convert", "{tiny}", "-o", "{tmp}/out", "--split", "lots"), "--split 'lots' is no size", "6GB"),
    (("convert", "{tiny}", "-o", "{tmp}/out", "--to", "f16"), "tensors would change their values", "--lossy"),
    (("plan", "{tiny}", "--memory", "lots"), "--memory 'lots' is no size", "6GB"),
    (("eval", "{tiny}", "--perplexity", "{tmp}/none.txt"), "none.txt", "UTF-8"),
    (("run", "{tiny}", ""), "the prompt is empty", ""),
])
def test_errors_are_one_line_and_a_hint(arguments: tuple[str, ...], error: str, hint: str, fewbits: Run, tiny: Path,
                                        tmp_path: Path) -> None:
    flags = ["--raw"] if arguments[0] == "run" else []
    code, out, err = fewbits(*(a.format(tiny=tiny, tmp=tmp_path) for a in arguments), *flags)
    lines = err.strip().splitlines()
    assert code == 1 and out == ""
    assert lines[-1].startswith("hint: " if hint or len(lines) > 1 else "error: ")
    assert error in err and hint in err and "Traceback" not in err and len(lines) <= 2


def test_wrong_usage_is_exit_2(fewbits: Run) -> None:
    code, _, err = fewbits("quantize")
    assert code == 2 and "Traceback" not in err


def test_interrupt_is_exit_130(fewbits: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits import solvers

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(solvers, "solve_together", stop)
    code, _, err = fewbits("quantize", tiny, "-o", tmp_path / "q", "--to", "nf4")
    assert code == 130 and "resumes" in err and not (tmp_path / "q").exists()


@pytest.mark.parametrize("text,meant", [("6GB", 6 * 10**9), ("512MiB", 512 * 2**20), ("1.5g", 15 * 10**8), ("8", 8)])
def test_sizes(text: str, meant: int) -> None:
    assert nbytes(text, "--memory") == meant
    with pytest.raises(FewbitsError):
        nbytes("a" + text, "--memory")


def test_convert(fewbits: Run, tiny: Path, tmp_path: Path) -> None:
    code, out, _ = fewbits("convert", tiny, "-o", tmp_path / "m.gguf")
    assert code == 0 and f"{tmp_path / 'm.gguf'}: transformers → gguf" in out and out.rstrip().endswith("lossless")
    code, out, _ = fewbits("convert", tmp_path / "m.gguf", "-o", tmp_path / "parts", "--split", "200kB", "--json")
    found = json.loads(out)
    assert code == 0 and found["lossless"] and len(found["tensors"]) == 20
    assert len(list((tmp_path / "parts").iterdir())) > 1
    code, out, _ = fewbits("convert", tmp_path / "parts", "-o", tmp_path / "half", "--to", "f16", "--lossy", "-v")
    lines = [line for line in out.splitlines() if line.startswith("model.")]
    assert code == 0 and len(lines) == 20 and any("no: 0.0" in line for line in lines) and "not lossless" in out
