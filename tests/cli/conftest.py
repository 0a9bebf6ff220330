"""`fewbits` as a user types it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest

from fewbits.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fewbits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`fewbits("info", path)` -> exit code, stdout, stderr; on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fewbits", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run
