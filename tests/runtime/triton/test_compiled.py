"""The decoder's kernels, compiled for GPUs that are not there: what fits into registers, and what tensor cores do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SHARED_BYTES = {"sm80": 166912, "sm90": 232448, "gfx942": 65536}  # that a program can have


@pytest.mark.parametrize(("target", "calls"), [("sm80", "decoder, a prompt, wide"), ("sm90", "decoder, a token, wide"),
                                               ("gfx942", "decoder, a prompt, wide")])
def test_compiled(target: str, calls: str) -> None:
    code = f"import json, gpu_code; print(json.dumps([vars(c) for c in gpu_code.codes([{target!r}], {calls!r})]))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), *filter(None, sys.path)])
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert {c["kernel"] for c in found} >= {"_keep", "_attend", "_norm", "_gate"}
    for one in found:
        assert not one["spilled"] and one["shared_bytes"] <= SHARED_BYTES[target], one
        assert one["units"] or one["kernel"] != "_attend", "on tensor cores"
