"""Matrices that are multiplied with the same activations, side by side: one product in place of several."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from fewbits.codecs.floats import BF16, F16, F32
from fewbits.qtensor import QTensor
from fewbits.runtime.floats import Floats
from fewbits.runtime.reference import Prepared
from fewbits.runtime.triton.kernel import OnGpu, side_by_side

FLOATS = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}


def floats(values: torch.Tensor) -> Prepared:
    """A matrix, or a stack of them, that is multiplied as it is."""
    codec = FLOATS[values.dtype]
    q = QTensor(codec, tuple(values.shape), {"data": values.view(codec.matrix(values.shape))})
    return Floats().prepare(q, values.dtype)


def joined(weights: Sequence[Prepared]) -> list[tuple[Prepared, list[int]]]:
    """Fewer matrices, and which of `weights` each has, one after the other: those whose layouts are alike."""
    kinds = [_kind(w) for w in weights]
    found: list[tuple[Prepared, list[int]]] = []
    for _, group in groupby(sorted(range(len(weights)), key=lambda i: kinds.index(kinds[i])), key=lambda i: kinds[i]):
        members = list(group)
        whole = _whole([weights[i] for i in members])
        found += [(weights[i], [i]) for i in members] if whole is None else [(whole, members)]
    return found


def _kind(weight: Prepared) -> object:
    return weight.layout if isinstance(weight, OnGpu) else weight.codec.family


def _whole(parts: list[Prepared]) -> Prepared | None:
    if len(parts) == 1:
        return parts[0]
    packed = [p for p in parts if isinstance(p, OnGpu)]
    if packed:
        return side_by_side(packed)
    if parts[0].codec.family == "float":
        return floats(torch.cat([p.planes["data"] for p in parts]))
    return None
