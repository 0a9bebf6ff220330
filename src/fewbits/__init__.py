"""fewbits puts any language model into few bits: quantize, run, measure, in every file format people already use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.converting import convert
    from fewbits.explaining import explain
    from fewbits.finetuning.lora import finetune
    from fewbits.finishing.files import finish
    from fewbits.hf import FewbitsConfig
    from fewbits.inspection import inspect
    from fewbits.loading import load
    from fewbits.measure import bench, evaluate
    from fewbits.measure.compare import compare
    from fewbits.merging import merge
    from fewbits.planning import plan
    from fewbits.publishing import push
    from fewbits.quantizing import quantize
    from fewbits.verifying import verify

__version__ = "0.1.0"
__all__ = ["FewbitsConfig", "FewbitsError", "bench", "compare", "convert", "evaluate", "explain", "finetune", "finish",
           "inspect", "load", "merge", "plan", "push", "quantize", "verify"]

_HOMES = {"FewbitsConfig": "fewbits.hf",
          "bench": "fewbits.measure", "compare": "fewbits.measure.compare", "convert": "fewbits.converting",
          "evaluate": "fewbits.measure", "explain": "fewbits.explaining", "finetune": "fewbits.finetuning.lora",
          "finish": "fewbits.finishing.files", "inspect": "fewbits.inspection", "load": "fewbits.loading",
          "merge": "fewbits.merging", "plan": "fewbits.planning", "push": "fewbits.publishing",
          "quantize": "fewbits.quantizing", "verify": "fewbits.verifying"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewbits' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
