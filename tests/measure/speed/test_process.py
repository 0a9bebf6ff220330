"""Workers that answer, refuse, die and hang."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fewbits.measure.speed import process
from fewbits.measure.speed.process import Failed, Worker


def worker(path: Path, monkeypatch: pytest.MonkeyPatch, body: str, limit: float = 60) -> Worker:
    path.write_text(f"import json, os, sys, time\nfor line in sys.stdin:\n    job = json.loads(line)\n    {body}\n")
    monkeypatch.setattr(process, "WORKER", path)
    return Worker(sys.executable, 3, limit)


@pytest.mark.parametrize(("body", "why"), [
    ("print(json.dumps({'error': 'no'}), flush=True)", "no"),
    ("sys.exit('it broke')", r"its process died \(exit code 1\): it broke"),
    ("os.kill(os.getpid(), 9)", r"its process died \(SIGKILL\)$"),
    ("time.sleep(60)", "no answer within 1 s")])
def test_why_there_is_no_answer(body: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = worker(tmp_path / "worker.py", monkeypatch, body, 1 if "sleep" in body else 60)
    with pytest.raises(Failed, match=why):
        made.ask("load")
    made.close()


def test_answers_and_what_the_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = worker(tmp_path / "worker.py", monkeypatch, "print(json.dumps(job | {'t': os.environ['OMP_NUM_THREADS']}), "
                  "flush=True)")
    assert made.ask("load", model="m") == {"do": "load", "model": "m", "t": "3"}
    assert made.ask("repeat") == {"do": "repeat", "t": "3"}
    made.close()
    with pytest.raises(Failed, match="died"):
        Worker("false", 1).ask("load")


def test_the_worker_imports_no_fewbits_before_an_engine_is_named() -> None:
    made = Worker(sys.executable, 1)
    with pytest.raises(Failed, match="no_such_engine"):
        made.ask("load", engines=["no_such_engine"])
    with pytest.raises(Failed, match="nowhere.gguf"):
        made.ask("load", engines=["decoder", "modules"], model="nowhere.gguf", threads=1)
    made.close()
    folder = process.WORKER
    for file in folder.glob("*.py"):
        if file.name != "own.py":
            assert "import fewbits" not in file.read_text() and "from fewbits" not in file.read_text(), file.name
