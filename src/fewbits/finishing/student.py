"""Modules of a model put on tunable weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from fewbits.checkpoint import Entry
from fewbits.codecs.floats import Float
from fewbits.finishing.tuned import Tuned
from fewbits.qtensor import QTensor
from fewbits.runtime.build import is_linear
from fewbits.runtime.places import Place, Places

Make = Callable[[Entry, Place], "Tuned | None"]  # the layer for a quantized weight of a linear one, if it gets one


@dataclass
class Student:
    """What of the model, or the block of one, under `root` is being tuned."""

    root: nn.Module
    layers: dict[str, Tuned] = field(default_factory=dict)  # by the names of their weights
    floats: dict[str, tuple[Entry, str]] = field(default_factory=dict)  # norms and biases: where they are

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [f for layer in self.layers.values() for f in layer.factors.values()] + [
            self.root.get_parameter(at) for _, at in self.floats.values()]

    def results(self) -> dict[str, QTensor]:
        """The tuned tensors as files hold them."""
        found = {name: layer.result() for name, layer in self.layers.items()}
        for name, (entry, at) in self.floats.items():
            assert isinstance(entry.codec, Float)
            owner, _, leaf = at.rpartition(".")
            value = getattr(self.root.get_submodule(owner), leaf)
            data = value.detach().to(entry.codec.dtype).view(entry.codec.matrix(entry.shape))
            found[name] = QTensor(entry.codec, entry.shape, {"data": data})
        return found


def _tuned(entry: Entry, place: Place) -> Tuned | None:
    return Tuned(entry.load(), place.module._parameters["bias"]) if entry.codec.linear else None


def seat(root: nn.Module, places: Places, entries: Iterable[Entry], fixed: nn.Module | None = None,
         make: Make = _tuned, dtype: torch.dtype = torch.float32) -> Student:
    """Fill `entries` into a model whose modules lie under `root`: those of linear layers that `make` makes one of, all
    others decoded.

    The layer `fixed` is decoded too: the head, whose product is not the module's own here.
    """
    student = Student(root)
    linear: list[tuple[Entry, Place]] = []
    rest: list[tuple[Entry, Place]] = []
    for entry in entries:
        place = places.of(entry)
        inside = is_linear(place.module) and place.leaf == "weight" and place.module is not fixed
        (linear if inside and entry.codec.family != "float" else rest).append((entry, place))
    places.fill([entry for entry, _ in rest], dtype)  # biases, which layers are made with
    names = {module: name for name, module in root.named_modules()}
    for entry, place in linear:
        layer = make(entry, place)
        if layer is None:
            places.put(entry, dtype)
        else:
            student.layers[entry.name] = layer
            root.set_submodule(names[place.module], layer)
    for entry, place in rest:
        value = getattr(place.module, place.leaf)
        if isinstance(entry.codec, Float) and len(entry.shape) == 1 and isinstance(value, nn.Parameter):
            value.requires_grad_()
            student.floats[entry.name] = entry, f"{names[place.module]}.{place.leaf}"
    return student
