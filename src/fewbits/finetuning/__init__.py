"""Fine-tuning on quantized weights: data, the loop, LoRA adapters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewbits.finetuning.adapters import Lora
    from fewbits.finetuning.data import Data, Example, examples
    from fewbits.finetuning.loop import Outcome, Settings, run
    from fewbits.finetuning.lora import Finetuned, finetune
    from fewbits.finetuning.qat import Trained, qat

_HOMES = {"Data": "data", "Example": "data", "examples": "data", "Outcome": "loop", "Settings": "loop",
          "run": "loop", "Lora": "adapters", "Finetuned": "lora", "finetune": "lora", "Trained": "qat", "qat": "qat"}
__all__ = ["Data", "Example", "Finetuned", "Lora", "Outcome", "Settings", "Trained", "examples", "finetune", "qat",
           "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
