"""Pages of mapped files are let go of; nothing else is."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from fewbits.memory import forget


def resident(address: int) -> int:
    """Kilobytes that are there of the mapping which holds `address`."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            found = begin <= address < end
        elif found and line.startswith("Rss:"):
            return int(line.split()[1])
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux which pages are there")
def test_only_pages_of_files_go(tmp_path: Path) -> None:
    meant = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    (tmp_path / "data").write_bytes(meant.tobytes())
    with open(tmp_path / "data", "rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    assert np.array_equal(mapped, meant) and resident(mapped.ctypes.data) >= 1024
    forget(mapped.ctypes.data, mapped.nbytes)
    assert resident(mapped.ctypes.data) < 64
    assert np.array_equal(mapped, meant)
    own = meant.copy()
    forget(own.ctypes.data, own.nbytes)
    assert np.array_equal(own, meant)
