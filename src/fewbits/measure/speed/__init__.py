"""How fast models compute, and in how much memory: candidates in turns, each in a process of its own."""

from fewbits.measure.speed.benching import bench
from fewbits.measure.speed.rows import Speed

__all__ = ["Speed", "bench"]
