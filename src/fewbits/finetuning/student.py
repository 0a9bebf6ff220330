"""The model that quantization-aware training trains: fake quantized layers, norms and biases as files hold them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from fewbits.checkpoint import Checkpoint, Entry
from fewbits.errors import FewbitsError
from fewbits.finetuning.fake import Fake
from fewbits.finishing.student import Student, seat
from fewbits.finishing.tuned import Tuned
from fewbits.runtime.build import empty_model
from fewbits.runtime.places import Place, Places


def student(source: Checkpoint, start: Checkpoint, dtype: torch.dtype, learn_scales: bool) -> Student:
    """A model that computes exactly what `start`, a quantized `source`, does, with float weights to train under it.

    Embeddings, the head and experts stay as `start` has them.

    Raises:
        FewbitsError: no linear layer of it is quantized.
    """
    net = empty_model(start.config, start.path)
    there, original = Places(net, start), Places(net, source)

    def make(entry: Entry, place: Place) -> Tuned:
        own = source.entries[entry.name]
        weight = own.load().dequantize()
        weight = weight if original.of(own).turned == place.turned else weight.T
        return Fake(entry.load(), place.module._parameters["bias"], weight, learn_scales)

    found = seat(net, there, start.entries.values(), net.get_output_embeddings(), make, dtype)
    if not found.layers:
        raise FewbitsError(f"{start.path}: no linear layer in it is quantized", "give --qat a recipe of few bits")
    net.tie_weights()
    gains = [layer.gain for layer in found.layers.values()]
    gain = math.exp(sum(map(math.log, gains)) / len(gains))
    for entry, at in found.floats.values():
        owner, _, leaf = at.rpartition(".")
        module = net.get_submodule(owner)
        value = module.get_parameter(leaf).detach()
        parametrize.register_parametrization(module, leaf, _AsFiled(value, entry.codec.dtype, gain))  # type: ignore
    return found


class _AsFiled(nn.Module):
    """A float tensor as its file rounds it; what is trained is by how much it differs from the one at the start."""

    def __init__(self, start: torch.Tensor, filed: torch.dtype, gain: float):
        super().__init__()
        self.start, self.filed = start, filed
        self.size = gain * (float(start.float().square().mean().sqrt()) or 1.0)

    def forward(self, change: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = _Rounded.apply(self.start + self.size * change, self.filed)
        return value

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        return (value - self.start) / self.size


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, filed: torch.dtype) -> torch.Tensor:
        return value.to(filed).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return grads[0], None
