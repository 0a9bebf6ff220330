"""Packed weights of a checkpoint on their way into a model that Transformers is loading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming, apply_renamings

from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.floats import Float
from fewbits.containers import experts
from fewbits.runtime.linear import holds_packed
from fewbits.runtime.places import Place, Places
from fewbits.runtime.placing import Placing

Make = Callable[[nn.Module, str, Any], nn.Parameter]


class Stored:
    """Which entries of the checkpoint make which parameter of the model."""

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, make: Make):
        self.checkpoint, self.model, self.make = checkpoint, model, make
        self.places = Places(model, checkpoint)
        self.parts: dict[str, list[tuple[Entry, Place]]] = {}
        shared = set()
        for entry in filter(self.places.has, checkpoint.entries.values()):  # Transformers reports the others
            place = self.places.of(entry)
            name = self.places.name(place)
            self.parts.setdefault(name, []).append((entry, place))
            if not isinstance(entry.codec, Float):
                shared.add(name)
        self.parts = {name: parts for name, parts in self.parts.items() if name in shared}

    def converter(self, conversions: list[Any]) -> Converter:
        """What Transformers meets the raw tensors with: it finds them by their names, after its own renamings."""
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        homes = {}
        for parameter, parts in self.parts.items():
            for entry, _ in parts:
                for name in _names(entry):
                    homes[apply_renamings(name, renamings)] = parameter
        return Converter(self, homes)

    def fill(self, name: str, dtype: Any, placed: Placing) -> nn.Parameter:
        """Load the parameter `name` into its module, packed where there is a layer for that; and return it."""
        parts = self.parts[name]
        entry, place = parts[0]
        if place.leaf == "weight" and holds_packed(place.module):
            return self.make(self.model, name, entry.load())
        self.places.fill([e for e, _ in parts], dtype, placed)
        found: nn.Parameter = getattr(place.module, place.leaf)
        return found


    def packed(self, name: str) -> Entry | None:
        """What the parameter `name` is made of, where there is a layer for its packed weight."""
        entry, place = self.parts.get(name, [(None, None)])[0]
        return entry if place and place.leaf == "weight" and holds_packed(place.module) else None


class Converter(WeightConverter):
    """Takes all raw tensors of packed weights, which it never loads, and loads the weights itself."""

    __slots__ = ("stored", "homes")

    def __init__(self, stored: Stored, homes: dict[str, str]):
        super().__init__(["packed weights"], ["weight"], [Concatenate()])  # one is demanded, none is run
        self.stored, self.homes = stored, homes

    def __deepcopy__(self, memo: Any) -> Converter:
        return Converter(self.stored, self.homes)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """`x.qweight`, `x.weight.absmax`, `x.weight.codes` and so on belong to the weight `x.weight`."""
        owner = source_key
        while owner and source_key.rpartition(".")[2] != "bias":
            for name in (owner, f"{owner}.weight"):
                if name in self.homes:
                    return self.homes[name], self.source_patterns[0]
            owner = owner.rpartition(".")[0]
        return source_key, None

    def convert(self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None,
                loading_info: Any = None) -> dict[str, nn.Parameter]:
        self.collected_tensors.clear()
        return {layer_name: self.stored.fill(layer_name, hf_quantizer.dtype, hf_quantizer.placed)}


def _names(entry: Entry) -> list[str]:
    """The names that an entry goes by in files: of stacked experts one each."""
    if experts.splits(entry.name, entry.shape) and len(entry.shape) == 3:
        return [entry.name, *(experts.one(entry.name, i) for i in range(entry.shape[0]))]
    return [entry.name]
