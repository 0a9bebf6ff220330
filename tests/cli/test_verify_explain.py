"""`fewbits verify` and `fewbits explain` as a user types them."""

from __future__ import annotations

import json
import shutil

import pytest


def test_verify(fewbits, shared, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(shared("models/stories260k"), path)
    code, out, err = fewbits("verify", path, "--checksums", tmp_path / "sums")
    assert code == 0 and out.startswith(f"{path}: no errors, no warnings in 47 tensors, 5 files, ") and not err
    (path / "extra.txt").write_text("x")
    config = json.loads((path / "config.json").read_text()) | {"vocab_size": 9}
    (path / "config.json").write_text(json.dumps(config))
    code, out, err = fewbits("verify", path, "--quick", "--against", tmp_path / "sums")
    lines = out.splitlines()
    assert code == 1 and not err and "3 errors, 1 warning in 47" in lines[-1]
    assert "error: config.json: vocab_size is 9; the embedding has 512 rows" in lines
    assert "warning: extra.txt: is not in the list of checksums" in lines
    code, out, _ = fewbits("verify", path, "--quick", "--json")
    found = json.loads(out)
    assert code == 1 and found["ok"] is False and {f["level"] for f in found["findings"]} == {"error"}


def test_verify_of_nothing(fewbits, tmp_path):
    code, out, err = fewbits("verify", tmp_path / "none")
    assert code == 1 and not out and err.startswith("error: ") and "no such file or directory" in err


@pytest.mark.parametrize("value", ["0.1", "-3.75e-3", "-inf", "0x3dcc", "1e6"])
def test_explain_a_number(fewbits, value):
    code, out, err = fewbits("explain", value, "--block", "0.25,-0.5")
    assert code == 0 and not err and "bf16" in out and ("Q4_K" in out) == (value != "-inf")
    assert max(map(len, out.splitlines())) <= 80
    if value == "0.1":
        assert "0 01111011 10011001100110011001101" in out and "0x3dcccccd" in out


@pytest.mark.parametrize("name", ["Q4_K", "nf4-dq", "fp8-e4m3-b128", "int4-g128-asym", "IQ2_XXS", "bf16", "Q3_K"])
def test_explain_a_codec(fewbits, name):
    code, out, err = fewbits("explain", name)
    assert code == 0 and not err and out.startswith(f"{name}:".upper() if name == "bf16" else f"{name}:")
    assert max(map(len, out.splitlines())) <= 80 and "docs/formats/" in out
    if name == "Q4_K":
        assert "│ d       │ dmin    │ scales" in out and "qs       16…143" in out


def test_explain_as_json_and_errors(fewbits):
    code, out, _ = fewbits("explain", "0.1", "--max", "0.5", "--json")
    assert code == 0 and json.loads(out)["formats"][0]["hex"] == "0x3dcccccd"
    code, out, _ = fewbits("explain", "nf4", "--json")
    assert code == 0 and len(json.loads(out)["levels"]) == 16
    for arguments, message in ((("Q9",), "neither a number nor a codec"), (("1", "--block", "a,b"), "no list of"),
                               (("1", "--max", "-1"), "is no magnitude"), (("0x3d", "--as", "fp9"), "unknown format")):
        code, out, err = fewbits("explain", *arguments)
        assert code == 1 and not out and message in err and "hint: " in err
