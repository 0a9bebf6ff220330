"""Heavy modules, imported when an attribute is first used: reading a header must not cost seconds of start-up."""

from __future__ import annotations

import importlib
import types
from typing import TYPE_CHECKING, Any


class _Lazy(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        found = getattr(importlib.import_module(self.__name__), name)
        self.__dict__[name] = found  # inner loops ask often
        return found


if TYPE_CHECKING:
    import torch as torch
    import transformers as transformers
else:
    torch = _Lazy("torch")
    transformers = _Lazy("transformers")
