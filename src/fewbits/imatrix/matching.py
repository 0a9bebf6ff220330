"""From an importance matrix, which names tensors as GGUF does, to the tensors of a checkpoint."""

from __future__ import annotations

import math

from fewbits import arch
from fewbits.arch import Tensor
from fewbits.calibration.statistics import Diagonal
from fewbits.checkpoint import Checkpoint
from fewbits.codecs.base import Shape
from fewbits.containers import experts
from fewbits.containers.gguf_config import own_config
from fewbits.errors import FewbitsError
from fewbits.imatrix.data import Imatrix
from fewbits.lazy import torch

FOREIGN = "statistics of another model"


def names(source: Checkpoint) -> list[Tensor]:
    """The tensors of `source` with their names on both sides.

    Raises:
        FewbitsError: a family that has no names in GGUF.
    """
    family = arch.lookup(source.config)
    if family is None:
        raise FewbitsError(f"{source.path}: importance matrices name tensors as GGUF does; "
                           f"{arch.why_not_gguf(source.config)}", "quantize with --calibration instead")
    return arch.tensors(family, own_config(family, source))


def statistics(imatrix: Imatrix, source: Checkpoint) -> dict[str, Diagonal]:
    """What `Imatrix.statistics` says; experts both as their stack and one by one."""
    table = {t.gguf: t for t in names(source)}
    shapes: dict[str, list[Shape]] = {}
    for entry in source.entries.values():
        shapes.setdefault(experts.stack_of(entry.name), []).append(entry.shape)
    found: dict[str, Diagonal] = {}
    for name, sums in imatrix.entries.items():
        tensor = table.get(name)
        if tensor is None or tensor.hf not in shapes:
            raise FewbitsError(f"{imatrix.path}: {FOREIGN}: {source.path} has no tensor {name}")
        shape = shapes[tensor.hf][0]
        if tensor.hf not in source.entries:  # experts apart
            shape = (len(shapes[tensor.hf]), *shape)
        if sums.sums.size != math.prod(shape[:-2]) * shape[-1]:
            raise FewbitsError(f"{imatrix.path}: {FOREIGN}: {name} has {_width(sums.sums.shape)} inputs, "
                               f"{source.path} has {_width((*shape[:-2], shape[-1]))}")
        values = torch.from_numpy(sums.mean).view(*shape[:-2], shape[-1])
        found[tensor.hf] = Diagonal(values)
        if experts.splits(tensor.hf, shape):
            found |= {experts.one(tensor.hf, i): found[tensor.hf].expert(i) for i in range(shape[0])}
    layers = {t.layer for t in table.values() if t.layer is not None}
    missing = layers - {table[name].layer for name in imatrix.entries}
    if missing:
        raise FewbitsError(f"{imatrix.path}: {FOREIGN}: it has {len(layers) - len(missing)} layers, {source.path} has "
                           f"{len(layers)} (layer {min(missing)} is missing)")
    return found


def _width(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape if shape[0] > 1 else shape[-1:]))
