"""What quantizing cost, and what it gained: divergence from the original, perplexity, speed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewbits.measure.divergence import Divergence, evaluate
    from fewbits.measure.speed import Speed, bench

__all__ = ["Divergence", "Speed", "bench", "evaluate"]

_HOMES = {"Divergence": "divergence", "evaluate": "divergence", "Speed": "speed", "bench": "speed"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
