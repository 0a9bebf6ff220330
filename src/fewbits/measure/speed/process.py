"""A worker's process: questions and answers through its pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "worker"
LIMIT_SECONDS = 1800.0  # of one answer


class Failed(Exception):
    """Why there is no answer."""


class Worker:
    """Runs until it is closed, or dies."""

    def __init__(self, python: str, threads: int, limit: float = LIMIT_SECONDS):
        self.limit, self._late = limit, False
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen([python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=self._said, env=environment, text=True)

    def ask(self, do: str, **job: Any) -> dict[str, Any]:
        """Its answer.

        Raises:
            Failed: with the reason that it gave, or with what it died of.
        """
        assert self._process.stdin and self._process.stdout
        late = threading.Timer(self.limit, self._kill)
        late.start()
        try:
            print(json.dumps({"do": do} | job), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late.cancel()
        if not line:
            raise Failed(self._death())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def _kill(self) -> None:
        self._late = True
        self._process.kill()

    def _death(self) -> str:
        code = self._process.wait()
        if self._late:
            return f"no answer within {self.limit:.0f} s"
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"its process died ({name})" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()
