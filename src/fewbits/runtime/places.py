"""Where each entry of a checkpoint lives in a Transformers model.

Mostly a parameter of that name. Transformers renames some on loading, and holds the experts of a layer in two fused
parameters, `gate_up_proj` and `down_proj`: a stack of gates is half of the rows of the first one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from fewbits import arch
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import Shape
from fewbits.containers import experts
from fewbits.errors import FewbitsError
from fewbits.runtime.placing import Placing


@dataclass(frozen=True)
class Place:
    """A parameter or buffer, or the part of one that an entry fills."""

    module: nn.Module
    leaf: str
    turned: bool = False  # it holds as [..., in, out] what the entry has as [..., out, in]
    expert: int | None = None  # which of the parameter's experts, where an entry is a single one
    part: tuple[int, int] = (0, 1)  # which of how many equal runs of rows of every expert

    @property
    def shared(self) -> bool:
        """Whether other entries fill the same parameter."""
        return self.expert is not None or self.part[1] > 1

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of the parameter `tensor` that the entry fills, in the entry's orientation."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.turned:
            tensor = tensor.transpose(-1, -2)
        at, count = self.part
        return tensor if count == 1 else tensor.chunk(count, dim=-2)[at]

    def put(self, value: torch.Tensor) -> None:
        """Fill it with `value`, in the entry's orientation."""
        meant: torch.Tensor = getattr(self.module, self.leaf)
        if not self.shared and not self.turned:
            self._hold(value)
            return
        if meant.is_meta:
            meant = value.new_empty(meant.shape)
            self._hold(meant)
        self.view(meant.data).copy_(value)

    def _hold(self, value: torch.Tensor) -> None:
        if self.leaf in self.module._parameters:
            setattr(self.module, self.leaf, nn.Parameter(value, requires_grad=False))
        else:
            self.module.register_buffer(self.leaf, value)


class Places:
    """The places of a model's parameters, for the entries of a checkpoint."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint):
        self.model, self.checkpoint = model, checkpoint
        self._names: dict[nn.Module, str] = {}

    def of(self, entry: Entry) -> Place:
        """The place of an entry, its shape checked.

        Raises:
            FewbitsError: the model has no such parameter, or one of another shape.
        """
        place = self._find(entry) or self._find_fused(entry)
        if place is None:
            raise FewbitsError(f"{self.checkpoint.path}: {type(self.model).__name__} has no parameter {entry.name}")
        shape = self._shape(place)
        if shape != tuple(entry.shape):
            raise FewbitsError(f"{self.checkpoint.path}: {entry.name} is {list(entry.shape)}, the configuration wants "
                               f"{list(shape)}")
        return place

    def owner(self, place: Place) -> str:
        """What the model calls the module."""
        if place.module not in self._names:  # modules may have been put in the place of others
            self._names = {module: name for name, module in self.model.named_modules()}
        return self._names[place.module]

    def name(self, place: Place) -> str:
        """What the model calls the parameter."""
        return f"{self.owner(place)}.{place.leaf}".lstrip(".")

    def has(self, entry: Entry) -> bool:
        """Whether the model has a place for an entry at all: one without a head has none for the head's weight."""
        return (self._find(entry) or self._find_fused(entry)) is not None

    def fill(self, entries: Iterable[Entry], dtype: torch.dtype, placed: Placing | None = None) -> None:
        """Decode entries into the model, a stack expert by expert; each on its device.

        Raises:
            FewbitsError: as for `of`, or not all parts of a fused parameter are there.
        """
        filled: Counter[tuple[nn.Module, str]] = Counter()
        for entry in entries:
            place = self.put(entry, dtype, placed)
            if place.shared:
                filled[place.module, place.leaf] += entry.parameters
        for (module, leaf), count in filled.items():
            if count != getattr(module, leaf).numel():
                raise FewbitsError(f"{self.checkpoint.path}: a part of {self.name(Place(module, leaf))} is missing")

    def fill_scalars(self, dtype: torch.dtype) -> None:
        """Parameters of one number (CLIP's `logit_scale`), which checkpoints carry as they are."""
        for name, buffer in self.checkpoint.buffers.items():
            owner, _, leaf = self.renamed(name).rpartition(".")
            meant = self._parameters.get(self.renamed(name))
            if meant is not None and not buffer.shape:
                Place(self.model.get_submodule(owner), leaf).put(buffer.load().to(dtype))

    def put(self, entry: Entry, dtype: torch.dtype, placed: Placing | None = None) -> Place:
        """Decode one entry into its place, on the device that is said of it, else where it lies."""
        place, tensor = self.of(entry), entry.load()
        if placed:
            tensor = tensor.to(placed.of(self.name(place)))
        if place.shared and len(entry.shape) == 3 and entry.codec.stacks(entry.shape):
            for i in range(entry.shape[0]):
                one = Place(place.module, place.leaf, place.turned, i, place.part)
                one.put(experts.expert(tensor, i).dequantize(dtype))
        else:
            place.put(tensor.dequantize(dtype))
        return place

    def _find(self, entry: Entry) -> Place | None:
        for name in (entry.name, self.renamed(entry.name)):
            owner_name, _, leaf = name.rpartition(".")
            try:
                owner = self.model.get_submodule(owner_name)
                getattr(owner, leaf)
            except AttributeError:
                continue
            return Place(owner, leaf, self._turned(entry, owner))
        return None

    def _turned(self, entry: Entry, module: nn.Module) -> bool:
        """Families of the table say it. Of others, `Conv1D` does, with float entries `[in, out]` as in their file."""
        if len(entry.shape) < 2:
            return False
        return (arch.transposed(self.checkpoint.config, entry.name)
                or (isinstance(module, Conv1D) and entry.codec.family != "float"))

    def _find_fused(self, entry: Entry) -> Place | None:
        one = experts.ONE.fullmatch(entry.name)
        name = self.renamed(experts.stack_of(entry.name))
        for ending, (target, part) in self._fused.items():
            if name.endswith(ending):
                owner, _, leaf = (name.removesuffix(ending) + target).rpartition(".")
                return Place(self.model.get_submodule(owner), leaf, expert=int(one[2]) if one else None, part=part)
        return None

    def _shape(self, place: Place) -> Shape:
        tensor = getattr(place.module, place.leaf)
        return tuple(place.view(tensor).shape) if tensor.ndim > 1 else tuple(tensor.shape)

    # what Transformers does on loading ------------------------------------------------------------------------------
    @cached_property
    def _conversions(self) -> list[Any]:
        from transformers.conversion_mapping import get_model_conversion_mapping

        assert isinstance(self.model, transformers.PreTrainedModel)
        return list(get_model_conversion_mapping(self.model))

    @cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @cached_property
    def _fused(self) -> dict[str, tuple[str, tuple[int, int]]]:
        """The end of a stack's name -> the end of its parameter's, and which part of that it is."""
        from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

        found = {}
        for c in self._conversions:
            if not isinstance(c, WeightConverter) or not isinstance(c.operations[0], MergeModulelist):
                continue
            joins = c.operations[1:]
            if all(isinstance(op, Concatenate) and op.dim == 1 for op in joins) and len(c.target_patterns) == 1:
                for i, source in enumerate(c.source_patterns):
                    found[source.replace(".*.", ".")] = c.target_patterns[0], (i, len(c.source_patterns))
        return found

    def renamed(self, name: str) -> str:
        """What Transformers calls a tensor that files know under another name: an older one, or without a prefix."""
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        assert isinstance(self.model, transformers.PreTrainedModel)
        renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]
        return rename_source_key(name, renamings, [], self.model.base_model_prefix, self._parameters)[0]
