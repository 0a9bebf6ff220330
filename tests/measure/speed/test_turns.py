"""Who is asked when, and what becomes of those that fail; workers are stand-ins here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewbits.measure.speed import turns
from fewbits.measure.speed.process import Failed
from fewbits.measure.speed.rows import Candidate, Work
from fewbits.measure.speed.turns import Runner

WORK = Work(4, 2, 1)
Asked = list[tuple[str, str]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What workers were asked: (Python, request), in order. `dies-N` fails at its N-th repetition."""
    seen: Asked = []

    class Stand:
        def __init__(self, python: str, threads: int):
            self.python = python

        def ask(self, do: str, **job: Any) -> dict[str, Any]:
            seen.append((self.python, do))
            if do == "load":
                if self.python == "unreadable":
                    raise Failed("it reads nothing")
                return {"import": 1.0, "load": float(len(seen)), "versions": {},
                        "device": "a GPU" if self.python == "a" else None}
            if do == "warm":
                return {"way": "best" if job["way"] is None else job["way"] + "!", "kernel": "fast", "resident": 5,
                        "anonymous": 3, "gpu": None}
            if self.python == f"dies-{seen.count((self.python, 'repeat'))}":
                raise Failed("its process died (SIGKILL)")
            return {"first": 1.0, "steps": [1.0, 1.0]}

        def close(self) -> None:
            seen.append((self.python, "close"))

    monkeypatch.setattr(turns, "Worker", Stand)
    return seen


def runners(*names: str) -> list[Runner]:
    return [Runner(Candidate(name, Path(name), "fewbits", ("decoder",), name), 1) for name in names]


def run(them: list[Runner], repeats: int = 3, seconds: float | None = None, together: bool = True) -> None:
    turns.measure(them, {"prompts": [[1]]}, repeats, seconds, together, lambda name: None)


def test_candidates_take_turns(asked: Asked) -> None:
    them = runners("a", "b")
    run(them)
    once = [(name, do) for name in "ab" for do in ("load", "warm")]
    assert asked == once + [(name, "repeat") for _ in range(3) for name in "ab"]
    asked.clear()
    run(them, 1)
    assert asked == [("a", "warm"), ("b", "warm"), ("a", "repeat"), ("b", "repeat")]
    assert [r.speed(WORK, {}).repeats for r in them] == [1, 1]
    assert [r.speed(WORK, {}).circumstances for r in them] == [{"device": "a GPU"}, {}]


def test_one_at_a_time_where_memory_is_short(asked: Asked) -> None:
    them = runners("a", "b")
    run(them, 2, together=False)
    first, again = ["load", "warm", "close"], ["load", "warm", "repeat", "close"]
    assert asked == [(name, do) for turn in (first, again, again) for name in "ab" for do in turn]
    found = them[0].speed(WORK, {})
    assert found.repeats == 2 and found.load_seconds == 7  # of 1, 7 and 15, by the stand-in
    assert them[0].job["way"] == "best!!", "the way that was the fastest is not looked for again"


def test_time_ends_rounds_but_not_before_two(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(turns.time, "monotonic", lambda: next(clock))
    them = runners("a")
    run(them, 5, seconds=5)
    assert them[0].speed(WORK, {}).repeats == 2
    run(them, 9, seconds=35)
    assert 2 < them[0].speed(WORK, {}).repeats < 9


def test_the_others_go_on(asked: Asked) -> None:
    them = runners("unreadable", "dies-2", "c")
    run(them)
    unreadable, dead, sound = (r.speed(WORK, {"seed": 1}) for r in them)
    assert unreadable.reason == "it reads nothing" and dead.reason == "its process died (SIGKILL)"
    assert unreadable.prefill_tokens_per_second is None and dead.prefill_tokens_per_second is None
    assert sound.reason is None and sound.repeats == 3 and sound.resident_bytes == 5 and sound.kernel == "fast"
    asked.clear()
    run(them, 1)
    assert ("unreadable", "load") not in asked, "what cannot be read is not tried for every work"
    assert ("dies-2", "load") in asked and them[1].speed(WORK, {}).reason is None


def test_progress_says_who(asked: Asked) -> None:
    said: list[str] = []
    say: Callable[[str], None] = said.append
    turns.measure(runners("a", "b"), {}, 2, None, True, say)
    assert said == ["a", "b"] * 3
