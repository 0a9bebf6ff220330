"""What memory there is, and having some of it made ready."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fewbits import _native

if TYPE_CHECKING:
    from fewbits.checkpoint import Checkpoint


def available_bytes() -> int:
    """Memory that can be had on this machine without swapping."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def expect(checkpoint: Checkpoint) -> None:
    """Let another thread fill in pages for the packed weights of a model that is about to be compiled: systems take as
    long for fresh memory as the kernels for laying weights out."""
    needed = sum(e.nbytes for e in checkpoint.entries.values() if e.codec.family != "float") * 65 // 64
    if 0 < needed < available_bytes() // 2:
        _native.expect(needed)
