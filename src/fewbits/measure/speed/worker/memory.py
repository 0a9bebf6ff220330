"""What memory this process takes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .base import Json


class Memory:
    """The most that there was while it was watched; None where the system doesn't say."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.005):
                self._look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._look()

    def _look(self) -> None:
        for name, found in status().items():
            self.seen[name] = max(found, self.seen.get(name, 0))

    def most(self) -> Json:
        torch = sys.modules.get("torch")
        gpu = torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else None
        return {"resident": self.seen.get("VmHWM"), "anonymous": self.seen.get("RssAnon"), "gpu": gpu}


def status() -> dict[str, int]:
    """Bytes, by the names of Linux; elsewhere resident memory at most."""
    try:
        with open("/proc/self/status") as lines:
            pairs = (line.split(":") for line in lines if line.endswith(" kB\n"))
            return {name: int(value.split()[0]) * 1024 for name, value in pairs}
    except OSError:
        return _most_resident()


def _most_resident() -> dict[str, int]:
    try:
        import resource
    except ImportError:  # Windows
        return {}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"VmHWM": most if sys.platform == "darwin" else most * 1024}
