"""An importance matrix of a model's own: the original weights run over a calibration text, block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fewbits.checkpoint import Checkpoint
from fewbits.containers import experts
from fewbits.containers.base import Progress
from fewbits.imatrix.data import Imatrix, Sums
from fewbits.imatrix.matching import names
from fewbits.lazy import torch

if TYPE_CHECKING:
    from fewbits.calibrate import Statistics, Walk
    from fewbits.sources import Calibration


def collect(source: Checkpoint, calibration: Calibration, progress: Progress | None = None, *,
            head: bool = False) -> Imatrix:
    """The importance matrix of `source` on the batches of `calibration`; with `head`, an untied output head's too.

    Nothing is quantized on the way, so every layer sees the inputs that it has in the original.

    Raises:
        FewbitsError: a family without GGUF names, or activations that are not finite.
    """
    from fewbits.calibrate import Walk

    table = names(source)
    walk = Walk(source, calibration.batches)
    found: dict[str, dict[int, Statistics]] = {}  # Transformers' name -> matrix -> its statistics
    for i, block in enumerate(walk):
        if progress:
            progress("collecting", i, len(walk))
        for name, statistics in block.statistics().items():
            one = experts.ONE.fullmatch(name)
            found.setdefault(experts.stack_of(name), {})[int(one[2]) if one else 0] = statistics
    sums = {name: _sums(matrices, _matrices(source, name)) for name, matrices in found.items()}
    entries = {t.gguf: sums[t.hf] for t in table if t.hf in sums}
    named = next((t for t in table if t.role == "output"), None)
    if head and named:
        entries[named.gguf] = _sums({0: _of_head(walk)}, 1)
    lengths = [next(iter(b.values())).shape[1] for b in calibration.batches]
    return Imatrix(entries, [calibration.description], -(-calibration.tokens // max(lengths)), max(lengths))


def _matrices(source: Checkpoint, name: str) -> int:
    """How many matrices a tensor is: experts of a stack, or 1."""
    if name in source.entries:
        shape = source.entries[name].shape
        return int(np.prod(shape[:-2]))
    return sum(experts.stack_of(other) == name for other in source.entries)


def _sums(found: dict[int, Statistics], matrices: int) -> Sums:
    """Those of every matrix; one without statistics saw no token."""
    inputs = len(next(iter(found.values())).diagonal)
    sums, counts = np.zeros((matrices, inputs), np.float32), np.zeros(matrices, np.int64)
    for i, statistics in found.items():
        sums[i], counts[i] = (statistics.diagonal.double() * statistics.count).numpy(), statistics.count
    return Sums(sums, counts)


def _of_head(walk: Walk) -> Statistics:
    """Statistics of the output head's inputs, after the walk: the model from its last block's outputs on."""
    from fewbits.calibrate import Statistics

    head, outputs = walk.model.get_output_embeddings(), iter(walk.inputs)
    found = Statistics.zeros(head.weight.shape[-1])

    def see(x: torch.Tensor) -> torch.Tensor:
        found.add(x)
        return x[..., :1]  # no logits: they cost as much as some blocks

    def through(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return x

    def first(*_: Any, **__: Any) -> torch.Tensor:
        return next(outputs)

    forwards: list[tuple[Any, Callable[..., Any]]] = [(m, through) for m in walk.modules]
    forwards[0] = (walk.modules[0], first)
    originals = [m.forward for m, _ in [*forwards, (head, see)]]
    for module, forward in [*forwards, (head, see)]:
        module.forward = forward
    try:
        with torch.inference_mode():
            for batch in walk.batches:
                walk.model(**batch, use_cache=False)
    finally:
        for (module, _), original in zip([*forwards, (head, see)], originals, strict=True):
            module.forward = original
    return found
