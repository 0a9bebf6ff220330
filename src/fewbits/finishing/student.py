"""Modules of a model put on tunable weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from fewbits.checkpoint import Entry
from fewbits.codecs.floats import Float
from fewbits.finishing.tuned import Tuned
from fewbits.qtensor import QTensor
from fewbits.runtime.build import is_linear
from fewbits.runtime.places import Places


@dataclass
class Student:
    """What of a model, or of a block of one, is being tuned."""

    layers: dict[str, Tuned] = field(default_factory=dict)  # by the names of their weights
    floats: dict[str, tuple[Entry, nn.Parameter]] = field(default_factory=dict)  # norms and biases

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [f for layer in self.layers.values() for f in layer.factors.values()] + [
            p for _, p in self.floats.values()]

    def results(self) -> dict[str, QTensor]:
        """The tuned tensors as files hold them."""
        found = {name: layer.result() for name, layer in self.layers.items()}
        for name, (entry, p) in self.floats.items():
            assert isinstance(entry.codec, Float)
            data = p.detach().to(entry.codec.dtype).view(entry.codec.matrix(entry.shape))
            found[name] = QTensor(entry.codec, entry.shape, {"data": data})
        return found


def seat(root: nn.Module, places: Places, entries: Iterable[Entry], fixed: nn.Module | None = None) -> Student:
    """Fill `entries` into a model whose modules lie under `root`: linear layers as `Tuned` ones, all others decoded.

    The layer `fixed` is decoded too: the head, whose product is not the module's own here.
    """
    student, rest, replaced = Student(), [], []
    for entry in entries:
        place = places.of(entry)
        if entry.codec.linear and is_linear(place.module) and place.leaf == "weight" and place.module is not fixed:
            replaced.append((entry, place.module))
        else:
            rest.append((entry, place))
    places.fill([entry for entry, _ in rest], torch.float32)
    for entry, place in rest:
        value = getattr(place.module, place.leaf)
        if isinstance(entry.codec, Float) and len(entry.shape) == 1 and isinstance(value, nn.Parameter):
            value.requires_grad_()
            student.floats[entry.name] = entry, value
    names = {module: name for name, module in root.named_modules()}
    for entry, module in replaced:
        student.layers[entry.name] = Tuned(entry.load(), module._parameters["bias"])
        root.set_submodule(names[module], student.layers[entry.name])
    return student
