"""Statistics of a layer's inputs: their second moment, its diagonal, and how far they are from the original model's."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewbits.codecs.base import Shape
from fewbits.lazy import torch

Counts = tuple[int, ...] | None  # rows of each expert


@dataclass(eq=False)
class Statistics:
    """The second moment of a layer's inputs: mean of x xᵀ `[in, in]` over `count` tokens.

    `drift`, where it is taken, is the mean of (x0 - x) xᵀ `[in, in]`, x0 being what the original model's layer reads at
    the same token. `peak` is the largest magnitude of each input `[in]`.
    """

    moment: torch.Tensor
    count: int = 0
    drift: torch.Tensor | None = None
    peak: torch.Tensor | None = None

    @classmethod
    def zeros(cls, inputs: int, drift: bool = False, device: torch.device | None = None) -> Statistics:
        moment = torch.zeros(inputs, inputs, device=device)
        return cls(moment, 0, torch.zeros_like(moment) if drift else None, torch.zeros(inputs, device=device))

    def add(self, x: torch.Tensor, original: torch.Tensor | None = None, counts: Counts = None) -> None:
        """Take in the inputs `x` `[..., in]`, and the `original` model's at the same tokens."""
        x = x.reshape(-1, x.shape[-1]).float()
        if not len(x):
            return
        total = self.count + len(x)
        self.moment.mul_(self.count / total).addmm_(x.T, x, alpha=1 / total)
        if self.drift is not None:
            assert original is not None
            difference = original.reshape(x.shape).float() - x
            self.drift.mul_(self.count / total).addmm_(difference.T, x, alpha=1 / total)
        if self.peak is not None:
            self.peak = torch.maximum(self.peak, x.abs().amax(0))
        self.count = total

    def blend(self, others: Statistics, tokens: int) -> None:
        """Count `others` as `tokens` more tokens in the means; `count` stays what was truly seen."""
        share = tokens / max(1, self.count + tokens)
        self.moment.lerp_(others.moment, share)
        if self.drift is not None and others.drift is not None:
            self.drift.lerp_(others.drift, share)
        if self.peak is not None and others.peak is not None and not self.count:
            self.peak = others.peak

    @property
    def peaks(self) -> torch.Tensor:
        """The largest magnitude of all inputs `[1]`."""
        assert self.peak is not None
        return self.peak.amax().view(1)

    def expert(self, index: int) -> Statistics:
        """Those of one layer of a stack, where all read the same."""
        return self

    @property
    def diagonal(self) -> torch.Tensor:
        """Mean square of every input `[in]`: what others call an importance matrix."""
        return self.moment.diagonal()

    def importance(self, shape: Shape, matrix: tuple[int, int]) -> torch.Tensor:
        """The diagonal laid along the columns of a codec's matrix (flattened where blocks cross rows)."""
        if matrix[1] == shape[-1]:
            return self.diagonal
        return self.diagonal.expand(math.prod(shape[:-1]), shape[-1]).reshape(matrix)


class Experts:
    """Statistics of the experts of one layer, for a weight `[experts, out, in]`.

    A second moment of few tokens says little of inputs to come: the mean over all experts counts as `in` more tokens of
    each. An expert that saw none has that mean.
    """

    def __init__(self, experts: int, inputs: int, drift: bool = False, device: torch.device | None = None):
        self.parts = [Statistics.zeros(inputs, drift, device) for _ in range(experts)]  # as they were seen
        self._blended = False

    @property
    def counts(self) -> list[int]:
        return [part.count for part in self.parts]

    @property
    def few(self) -> int:
        """How many experts saw fewer tokens than they have inputs."""
        return sum(part.count < len(part.moment) for part in self.parts)

    def add(self, x: torch.Tensor, original: torch.Tensor | None = None, counts: Counts = None) -> None:
        """Take in inputs `x` `[rows, in]`, expert after expert, `counts` rows each, and the `original` model's."""
        at = 0
        for part, count in zip(self.parts, counts or (), strict=True):
            rows = slice(at, at + count)
            part.add(x[rows], None if original is None else original[rows])
            at += count

    def expert(self, index: int) -> Statistics:
        """Statistics of one expert, blended with the mean over all; nothing can be added from then on."""
        if not self._blended:
            mean = self._mean()
            for part in self.parts:
                part.blend(mean, len(part.moment))
            self._blended = True
        return self.parts[index]

    def _mean(self) -> Statistics:
        first, total = self.parts[0], sum(self.counts)
        mean = Statistics.zeros(len(first.moment), first.drift is not None, first.moment.device)
        for part in self.parts:
            mean.moment.add_(part.moment, alpha=part.count / max(1, total))
            if mean.drift is not None and part.drift is not None:
                mean.drift.add_(part.drift, alpha=part.count / max(1, total))
            if mean.peak is not None and part.peak is not None:
                mean.peak = torch.maximum(mean.peak, part.peak)
        mean.count = total
        return mean

    @property
    def peaks(self) -> torch.Tensor:
        """The largest magnitude of the inputs of each expert `[experts]`."""
        return torch.cat([self.expert(i).peaks for i in range(len(self.parts))])

    def importance(self, shape: Shape, matrix: tuple[int, int]) -> torch.Tensor:
        """Diagonals laid along the weight `[experts, out, in]`, in the shape of a codec's matrix."""
        diagonals = torch.stack([self.expert(i).diagonal for i in range(len(self.parts))])
        return diagonals[:, None].expand(shape).reshape(matrix)


@dataclass(frozen=True)
class Diagonal:
    """Mean squares of a layer's inputs alone, `[in]` or of a stack of experts `[experts, in]`: an importance matrix."""

    values: torch.Tensor

    def to(self, device: torch.device) -> Diagonal:
        return Diagonal(self.values.to(device))

    def expert(self, index: int) -> Diagonal:
        """Those of one expert, where experts have their own."""
        return Diagonal(self.values[index]) if self.values.ndim == 2 else self

    def importance(self, shape: Shape, matrix: tuple[int, int]) -> torch.Tensor:
        """The values laid along the columns of a codec's matrix: `[in]`, or `matrix` where its rows differ."""
        if self.values.ndim == 2:
            return self.values[:, None].expand(shape).reshape(matrix)
        return self.values if matrix[1] == shape[-1] else self.values.expand(shape).reshape(matrix)


Found = Statistics | Experts
Known = Found | Diagonal  # what a search can be weighted by
