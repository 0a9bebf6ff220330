"""Plain lines mean what typer makes of them; others are left to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fewbits.cli import application, chat, plain, run

LINES = [
    ["m", "p"], ["m", "-"], ["--raw", "m", "p", "--json"], ["m", "--max-tokens", "5", "p"], ["m", "p", "--seed", "-3"],
    ["m", "p", "--temperature=0.5", "--top-k=3", "--stop", "a", "--stop=b", "--grammar", "f.lark"],
    ["m", "p", "--logprobs", "2", "--context", "9", "--draft", "d", "--lookup", "--cache", "q8_0"],
    ["m", "p", "--seed", "1", "--seed", "2"], ["m", "", "--system", "say = so"], ["m", "p", "--logit-bias", "1=-2"],
]
TYPERS = [["--help"], ["m"], [], ["m", "p", "q"], ["m", "p", "--nothing"], ["m", "p", "--max-tokens"], ["m", "p", "-x"],
          ["m", "p", "--max-tokens", "0"], ["m", "p", "--max-tokens", "x"], ["m", "p", "--stop", "--raw"],
          ["m", "--", "--raw"], ["m", "p", "--raw=1"], ["m", "p", "--logprobs", "101"]]


def by_typer(words: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def keep(**given: Any) -> None:
        found.update(given)

    keep.__signature__, keep.__annotations__ = run.command.__signature__, run.command.__annotations__
    monkeypatch.setattr(run, "command", keep)
    application("run")(["run", *words], standalone_mode=False)
    return found


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_plain_lines(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = plain.parse(run.command, words)
    assert found is not None and found == by_typer(words, monkeypatch)
    assert found["grammar"] is None or isinstance(found["grammar"], Path)


@pytest.mark.parametrize("words", TYPERS, ids=" ".join)
def test_what_is_left_to_typer(words: list[str]) -> None:
    assert plain.parse(run.command, words) is None


def test_defaults_are_each_command_s_own() -> None:
    one, two = plain.parse(run.command, ["m", "p"]), plain.parse(chat.command, ["m"])
    assert one and two and (one["max_tokens"], two["max_tokens"]) == (128, 512)
    one["stop"].append("x")
    again = plain.parse(run.command, ["m", "p"])
    assert again and again["stop"] == []
