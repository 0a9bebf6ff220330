"""Kernels are compiled for GPUs that are not there: what Triton's interpreter cannot tell of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = {"sm80": ("IMMA", "HMMA"), "sm90": ("IMMA", "IGMMA", "HMMA", "HGMMA"), "gfx942": ("v_mfma_i32", "v_mfma_f32")}


def compiled(tmp_path: Path, target: str, *only: str) -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "benchmarks/gpu_code.py", "--targets", target, "--json", str(tmp_path / "codes.json")]
    done = subprocess.run([*command, *(["--only", *only] if only else [])], cwd=ROOT, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((tmp_path / "codes.json").read_text())


def check(codes: list[dict[str, Any]], target: str) -> None:
    for code in codes:
        assert code["spilled"] == 0 < code["registers"], code
        if code["kernel"] in ("multiply", "tile"):
            assert code["units"] and all(name.startswith(UNITS[target]) for name in code["units"])
        if code["kernel"] == "multiply":
            assert any(name.startswith(("IMMA", "IGMMA", "v_mfma_i32")) for name in code["units"])


@pytest.mark.parametrize("target", ["sm90", "gfx942"])
def test_every_kernel_compiles_and_keeps_to_its_registers(tmp_path: Path, target: str) -> None:
    codes = compiled(tmp_path, target, "int4-g128, 1 row", "int4-g128, 16 rows", "int4-g128, 512 rows", "int8, 16 rows")
    assert [code["kernel"] for code in codes] == ["matvec", "tile", "decode", "find_outliers", "round_rows", "multiply"]
    check(codes, target)
    if target == "sm90":  # four warps copy 20 KiB of a block and multiply 64 tiles of 16 x 8 x 32
        loop = codes[-1]["loop"]
        assert loop["turns"] == 1 and 16 + 10 < loop["instructions"] < 200
        assert loop["per_weight"] == pytest.approx(4 * loop["instructions"] / (64 * 256))


@pytest.mark.parametrize(("target", "call", "bytes_there"), [("sm90", "decoder, a token, wide", 232448),
                                                             ("gfx942", "decoder, a prompt, wide", 65536)])
def test_the_decoder_compiles_and_attends_on_tensor_cores(tmp_path: Path, target: str, call: str,
                                                          bytes_there: int) -> None:
    codes = compiled(tmp_path, target, call)
    assert {code["kernel"] for code in codes} >= {"_keep", "_attend", "_norm", "_gate"}
    check(codes, target)
    for code in codes:
        assert code["shared_bytes"] <= bytes_there and (code["units"] or code["kernel"] != "_attend")


@pytest.mark.slow
@pytest.mark.parametrize("target", list(UNITS))
def test_all_calls(tmp_path: Path, target: str) -> None:
    check(compiled(tmp_path, target), target)
