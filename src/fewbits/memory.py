"""What memory there is."""

from __future__ import annotations

import ctypes
import mmap
import os


def available_bytes() -> int:
    """Memory that can be had on this machine without swapping."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB"


def forget(address: int, nbytes: int) -> None:
    """Let pages of a mapped file, to which nobody has written, out of this process's memory; they come back when they
    are read. Anything else at that address stays: only the system's own list of mappings is believed.
    """
    try:
        with open("/proc/self/maps") as maps:
            rows = [line.split() for line in maps]
    except OSError:
        return
    for span, _, _, _, inode, *_ in rows:
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= address and address + nbytes <= end and inode != "0":
            first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
            return
