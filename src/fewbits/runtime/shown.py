"""Layers whose weight others look at: parts of Transformers cast what they hand to a layer to its weight's type.

T5 says `hidden_states.to(self.wo.weight.dtype)`, BLIP-2 the like of its projections. Bytes of packed weights would make
integers of activations. Such layers are found in the source of the module that holds them, and show an empty weight of
the type that they compute in; their codes are then a buffer like the other planes.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits.runtime.linear import QLinear

LOOKED_AT = re.compile(r"self\.([\w.\[\]]+)\.weight\.dtype")


def show_types(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the packed layers of `model` that others look at show `dtype`."""
    for module in model.modules():
        kind: Any = type(module)
        for path in _looked_at(kind):
            try:
                layer = module.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(layer, QLinear):
                layer.show(dtype)


@cache
def _looked_at(kind: Any) -> tuple[str, ...]:
    """What methods of a class call the layers whose weight's type they look at: `wo`, `layers.0.fc2`."""
    found = {path for part in kind.__mro__ if not part.__module__.startswith("torch.") for path in _in_class(part)}
    return tuple(sorted(found))


def _in_class(kind: type) -> Iterator[str]:
    if not _in_file(kind.__module__):
        return
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # made in memory
        return
    for path in LOOKED_AT.findall(source):
        yield path.replace("[", ".").replace("]", "")


@cache
def _in_file(module: str) -> bool:
    """Whether there is any such place in a module's file: parsing it for one class takes much longer."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and file.endswith(".py") and LOOKED_AT.search(Path(file).read_text("utf-8")) is not None
