"""What the forward pass keeps for the backward pass, in half the memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

LEAST = 1 << 16  # elements of a tensor that is worth it
RECENT = 8  # tensors that several layers may keep, one after another

Packed = tuple[torch.dtype, torch.Tensor] | torch.Tensor


@contextmanager
def halved(model: nn.Module) -> Iterator[None]:
    """Keep large float32 activations in bfloat16 until the backward pass; parameters of `model` as they are."""
    fixed = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    # a tensor is halved once, whichever layers keep it: while it is held here, nothing else can lie in its place
    recent: OrderedDict[Any, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def pack(tensor: torch.Tensor) -> Packed:
        if tensor.dtype != torch.float32 or tensor.numel() < LEAST:
            return tensor
        if tensor.untyped_storage().data_ptr() in fixed:
            return tensor
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor._version
        if key not in recent:
            recent[key] = tensor, tensor.bfloat16()
            if len(recent) > RECENT:
                recent.popitem(last=False)
        recent.move_to_end(key)
        return tensor.dtype, recent[key][1]

    def unpack(packed: Packed) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else packed[1].to(packed[0])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
