"""`fewbits info --cpu`, and the environment variable that names a set of kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fewbits import _native, instructions
from fewbits.errors import FewbitsError


def info(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fewbits", "info", *options], capture_output=True, text=True,
                          env={**os.environ, **variables})


def test_the_best_usable_kernels_are_used_unless_another_is_named() -> None:
    named = json.loads(info("--cpu", "--json", FEWBITS_CPU="portable").stdout)
    assert named["used"] == "portable"
    best = json.loads(info("--cpu", "--json", FEWBITS_CPU="").stdout)
    assert best["used"] == best["kernels"][-1] and best["kernels"][0] == "portable"
    assert "kernels:" in info("--cpu").stdout


def test_unknown_kernels_are_an_error_of_one_line_and_a_hint() -> None:
    found = info("--cpu", FEWBITS_CPU="sse9")
    assert found.returncode == 1
    assert found.stderr.splitlines() == ["error: no kernels called 'sse9' run on this CPU",
                                         "hint: one of: " + ", ".join(_native.usable())]
    with pytest.raises(FewbitsError, match="sse9"):
        instructions.use("sse9")
    assert info().returncode == 1


def test_commands_that_compute_say_the_same() -> None:
    for what in ("Q4_K", "0.1"):
        found = subprocess.run([sys.executable, "-m", "fewbits", "explain", what], capture_output=True, text=True,
                               env={**os.environ, "FEWBITS_CPU": "sse9"})
        assert found.returncode == 1 and not found.stdout
        assert found.stderr.startswith("error: no kernels called 'sse9' run on this CPU\nhint: one of: portable")
