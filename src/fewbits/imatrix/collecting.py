"""An importance matrix of a model's own: the original weights run over a calibration text, block by block."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from fewbits.checkpoint import Checkpoint
from fewbits.containers import experts
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError
from fewbits.imatrix.data import Imatrix, Sums
from fewbits.imatrix.matching import names
from fewbits.lazy import torch

if TYPE_CHECKING:
    from fewbits.calibration.sources import Calibration
    from fewbits.calibration.walk import Block, Walk
    from fewbits.runtime.taps import Key


def collect(source: Checkpoint, calibration: Calibration, progress: Progress | None = None, *,
            head: bool = False) -> Imatrix:
    """The importance matrix of `source` on the batches of `calibration`; with `head`, an untied output head's too.

    Nothing is quantized on the way: every layer sees the inputs that it has in the original. Memory is one block and
    the activations.

    Raises:
        FewbitsError: a family without GGUF names, or activations that are not finite.
    """
    from fewbits.calibration.walk import Walk

    table = names(source)
    walk = Walk(source, calibration.batches)
    found: dict[str, Sums] = {}  # by Transformers' name
    for i, block in enumerate(walk):
        if progress:
            progress("collecting", i, len(walk))
        found |= _of_block(walk, block)
    entries = {t.gguf: found[t.hf] for t in table if t.hf in found}
    output = next((t for t in table if t.role == "output"), None)
    if head and output:
        entries[output.gguf] = _of_head(walk).sums
    lengths = [b["input_ids"].shape[-1] for b in calibration.batches]
    return Imatrix(entries, [calibration.description], -(-calibration.tokens // max(lengths)), max(lengths))


class _Adding:
    """Sums that grow, in double precision."""

    def __init__(self, matrices: int, inputs: int):
        self.total, self.counts = torch.zeros(matrices, inputs, dtype=torch.float64), np.zeros(matrices, np.int64)

    def add(self, x: torch.Tensor, counts: tuple[int, ...]) -> None:
        """Take in rows `x` `[rows, in]`, `counts` of them for each matrix."""
        for i, rows in enumerate(x.float().square().split(counts)):
            self.total[i] += rows.sum(0, dtype=torch.float64)
        self.counts += counts

    @property
    def sums(self) -> Sums:
        return Sums(self.total.float().numpy(), self.counts)


def _of_block(walk: Walk, block: Block) -> dict[str, Sums]:
    """Sums of all that the block's linear layers and experts read, by Transformers' names of their weights."""
    from fewbits.runtime.taps import Reading, tapped

    found: dict[Key, _Adding] = {}
    number = 0

    def see(reading: Reading) -> None:
        if reading.key not in block.entries:
            return
        if not bool(reading.x.isfinite().all()):
            raise FewbitsError(f"activations entering {block.entries[reading.key][0][0]} are not finite",
                               "is the source model intact?")
        keep = walk.mask(block.prefix, number)
        if keep is not None and reading.total == len(keep):
            reading = reading.only(keep)
        counts = reading.counts or (len(reading.x),)
        if reading.key not in found:
            found[reading.key] = _Adding(len(counts), reading.x.shape[-1])
        found[reading.key].add(reading.x, counts)

    with tapped(block.passes.module, see), torch.no_grad():
        for number in range(len(block.passes.inputs)):  # noqa: B007
            block.passes.output(number)
    return {experts.stack_of(name): adding.sums for key, adding in found.items() for name, _ in block.entries[key]}


def _of_head(walk: Walk) -> _Adding:
    """What the output head reads, after the walk: the model from its last block's outputs on."""
    walk.load_outside()
    head: Any = walk.model.get_output_embeddings()
    found, outputs = _Adding(1, head.weight.shape[-1]), iter(walk.inputs)

    def see(x: torch.Tensor) -> torch.Tensor:
        found.add(x.reshape(-1, x.shape[-1]), (x.shape[:-1].numel(),))
        return x[..., :1]  # no logits: they cost as much as some blocks

    def through(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return x

    def last(*_: Any, **__: Any) -> torch.Tensor:
        return next(outputs)

    blocks = [m for _, modules in walk.lists for m in modules]
    with ExitStack() as stack, torch.no_grad():
        for module, forward in [*((m, through) for m in blocks[:-1]), (blocks[-1], last), (head, see)]:
            module.forward = forward
            stack.callback(delattr, module, "forward")
        for batch in walk.batches:
            walk.model(**batch, use_cache=False)
    return found
