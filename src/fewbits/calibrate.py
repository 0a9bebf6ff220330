"""Statistics of a layer's inputs, and the walk that collects them block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import Shape
from fewbits.errors import FewbitsError
from fewbits.lazy import torch

if TYPE_CHECKING:
    from fewbits.qtensor import QTensor
    from fewbits.runtime.places import Places

Batches = list[dict[str, torch.Tensor]]  # keyword arguments of the model, one batch each


@dataclass
class Statistics:
    """The second moment of a layer's inputs: mean of x xᵀ `[in, in]` over `count` tokens."""

    moment: torch.Tensor
    count: int = 0

    @classmethod
    def zeros(cls, inputs: int) -> Statistics:
        return cls(torch.zeros(inputs, inputs))

    def add(self, x: torch.Tensor) -> None:
        """Take in the inputs `x` `[..., in]`."""
        x = x.reshape(-1, x.shape[-1]).float()
        total = self.count + len(x)
        self.moment.mul_(self.count / total).addmm_(x.T, x, alpha=1 / total)
        self.count = total

    @property
    def diagonal(self) -> torch.Tensor:
        """Mean square of every input `[in]`: what others call an importance matrix."""
        return self.moment.diagonal()

    def importance(self, shape: Shape, matrix: tuple[int, int]) -> torch.Tensor:
        """The diagonal laid along the columns of a codec's matrix (flattened where blocks cross rows)."""
        if matrix[1] == shape[-1]:
            return self.diagonal
        return self.diagonal.expand(math.prod(shape[:-1]), shape[-1]).reshape(matrix)


class Walk:
    """Runs a model block by block on batches of its inputs; memory holds one block, its statistics and activations.

    `for block in walk:` collect `block.statistics()`, hand changed weights to `block.replace`; the next block then
    sees the outputs of this one as it now is.
    """

    def __init__(self, checkpoint: Checkpoint, batches: Batches | torch.Tensor):
        from fewbits.runtime.build import blocks_of, empty_model
        from fewbits.runtime.places import Places

        if not isinstance(batches, list):  # tokens [samples, length]
            batches = [{"input_ids": row[None]} for row in batches]
        self.checkpoint, self.batches = checkpoint, batches
        self.model = empty_model(checkpoint.config, checkpoint.path)
        self.prefix, self.modules = blocks_of(self.model)
        self.places = Places(self.model, checkpoint)
        self._load([n for n in checkpoint.entries if not n.startswith(self.prefix)])
        self.inputs, self.arguments = self._first_inputs()

    def __len__(self) -> int:
        return len(self.modules)

    def _load(self, names: list[str]) -> None:
        self.places.fill([self.checkpoint.entries[n] for n in names], torch.float32)
        self.model.tie_weights()

    def _first_inputs(self) -> tuple[list[torch.Tensor], list[list[dict[str, Any]]]]:
        """Hidden states before the first block, and every block's other arguments, one of each a sample."""
        hidden: list[torch.Tensor] = []
        arguments: list[list[dict[str, Any]]] = [[] for _ in self.modules]
        originals = [m.forward for m in self.modules]
        positions = [[p.name for p in signature(f).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD][1:]
                     for f in originals]

        def recorder(i: int) -> Any:
            def forward(x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
                if i == 0:
                    hidden.append(x.detach())
                if len(rest) > len(positions[i]):
                    raise FewbitsError(f"block {i} of {type(self.model).__name__} takes arguments without a name",
                                       "use --solver search")
                named |= zip(positions[i], rest, strict=False)
                named.pop("past_key_values", None)
                arguments[i].append({**named, "use_cache": False} if "use_cache" in named else named)
                return x
            return forward

        for i, module in enumerate(self.modules):
            module.forward = recorder(i)
        try:
            with torch.inference_mode():
                for batch in self.batches:
                    self.model.base_model(**batch, use_cache=False)
        finally:
            for module, original in zip(self.modules, originals, strict=True):
                module.forward = original
        return hidden, arguments

    def __iter__(self) -> Iterator[Block]:
        for i, module in enumerate(self.modules):
            prefix = f"{self.prefix}{i}."
            self._load([n for n in self.checkpoint.entries if n.startswith(prefix)])
            block = Block(i, prefix, module, self.inputs, self.arguments[i], self.places)
            yield block
            self.inputs = block.run(keep=True)
            self.arguments[i] = []
            module.to("meta")


@dataclass
class Block:
    """One block of the walk, its weights in memory."""

    index: int
    prefix: str
    module: torch.nn.Module
    inputs: list[torch.Tensor]
    arguments: list[dict[str, Any]]
    places: Places

    def statistics(self) -> dict[str, Statistics]:
        """Weight name -> statistics of its layer's inputs; layers that read the same tensor share theirs."""
        from fewbits.runtime.build import is_linear

        found: dict[str, Statistics] = {}
        reads: dict[str, int] = {}  # name -> which tensor of this sample it read
        seen: list[torch.Tensor] = []

        def hook(name: str) -> Any:
            def see(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], __: Any) -> None:
                x = inputs[0]
                if not bool(x.isfinite().all()):
                    raise FewbitsError(f"activations entering {name} are not finite", "is the source model intact?")
                for other, at in reads.items():
                    if seen[at] is x:
                        found[name], reads[name] = found[other], at
                        return
                reads[name] = len(seen)
                seen.append(x)
                found.setdefault(name, Statistics.zeros(x.shape[-1])).add(x)
            return see

        handles = [m.register_forward_hook(hook(f"{self.prefix}{n}.weight"))
                   for n, m in self.module.named_modules() if is_linear(m)]

        def begin_sample() -> None:
            reads.clear()
            seen.clear()

        try:
            self.run(before=begin_sample)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def replace(self, name: str, q: QTensor) -> None:
        """Put the decoded `q` in the place of the block's own weight."""
        self.places.put(Entry(name, q.shape, q.codec, lambda: q), torch.float32)

    def run(self, keep: bool = False, before: Any = None) -> list[torch.Tensor]:
        outputs = []
        with torch.inference_mode():
            for x, arguments in zip(self.inputs, self.arguments, strict=True):
                if before:
                    before()
                y = self.module(x, **arguments)
                if keep:
                    outputs.append(y[0] if isinstance(y, tuple) else y)
        return outputs


def sample_tokens(tokens: list[int], samples: int, length: int, bos: int | None, source: str) -> torch.Tensor:
    """`[samples, length]` windows spread evenly over `tokens`, each beginning with `bos` where the model wants one.

    Raises:
        FewbitsError: fewer than `length` tokens.
    """
    body = length - (bos is not None)
    windows = len(tokens) // body
    if not windows:
        raise FewbitsError(f"{source}: {len(tokens)} tokens of text, one sequence needs {body}", "give more text")
    take = min(samples, windows)
    starts = [i * windows // take * body for i in range(take)]
    rows = [([bos] if bos is not None else []) + tokens[s:s + body] for s in starts]
    return torch.tensor(rows, dtype=torch.long)
