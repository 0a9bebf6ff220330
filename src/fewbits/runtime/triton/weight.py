"""A weight in the layout of the Triton kernels, and launches of these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import triton

from fewbits.codecs.base import Planes
from fewbits.runtime.triton import configs
from fewbits.runtime.triton.available import current
from fewbits.runtime.triton.decoding import decode
from fewbits.runtime.triton.layout import WORDS, Layout
from fewbits.runtime.triton.products import matvec, tile
from fewbits.runtime.triton.reading import ONE

DECODED = 1 << 25  # weights decoded at a time: 64 MiB of 16 bits


@dataclass(frozen=True)
class Weight:
    """A matrix `[out, in]`, or a stack of them; `planes` as `layout.pack` makes them, and `arrived` (int32, zeros)."""

    layout: Layout
    shape: tuple[int, ...]
    planes: Planes

    @property
    def device(self) -> torch.device:
        return self.planes["words"].device

    @cached_property
    def _constants(self) -> dict[str, object]:
        f = self.layout
        return {"LEVELS": f.levels, "SECOND": f.second, "ZERO": f.zero, "LOWER": f.lower, "UPPER": f.upper,
                "GROUP": f.group, "EVEN": self.shape[-1] % f.block == 0}

    @cached_property
    def _read(self) -> tuple[torch.Tensor, ...]:
        """The planes in the kernels' order; where there is none, any other in its place."""
        return tuple(self.planes.get(name, self.planes["words"])
                     for name in ("words", "upper", "scales", "second", "levels", "row"))

    @cached_property
    def _sizes(self) -> tuple[int, int, int, int]:
        """Outputs, columns, entries from an output's to the next, blocks."""
        words = self.planes["words"]
        return self.shape[-2], self.shape[-1], words.shape[-1], words.shape[-2] // WORDS

    def config(self, kernel: str, rows: int) -> configs.Config:
        outs, columns, *_ = self._sizes
        return configs.lookup(kernel, self.layout.bits, self.layout.group, rows, outs, columns, self.device)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x` `[n, in]` times the transposed matrix, plus bias: `[n, out]`, in the type of `x`."""
        outs, columns, _, _ = self._sizes
        out = x.new_empty(len(x), outs)
        if not len(x):
            return out
        if len(x) == 1:
            self._matvec(x, out, bias)
        elif len(x) >= configs.dense(self.layout.bits, self.layout.group, outs, columns, self.device):
            for at, part in self._decoded(x.dtype):
                torch.mm(x, part, out=out[:, at:at + part.shape[1]])
            if bias is not None:
                out += bias
        else:
            self._tile(x, out, bias)
        return out

    def _matvec(self, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> None:
        outs, columns, stride, blocks = self._sizes

        def launch(c: configs.Config) -> None:
            split = min(c.split, blocks)
            matvec[(triton.cdiv(outs, c.n), split)](
                x, out, out if bias is None else bias, *self._read, self._sums(split, 1), self.planes["arrived"], outs,
                columns, stride, blocks, ONE.value, **self._constants, BIAS=bias is not None, N=c.n, SPLIT=split,
                num_warps=c.warps, num_stages=c.stages)

        with current(self.device):
            configs.fitting("matvec", self.config("matvec", 1), launch)

    def _tile(self, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None,
              order: torch.Tensor | None = None, places: torch.Tensor | None = None) -> None:
        outs, columns, stride, blocks = self._sizes

        def launch(c: configs.Config) -> None:
            across, down = triton.cdiv(outs, c.n), triton.cdiv(len(x), c.m) if places is None else len(places)
            split = 1 if places is not None or across * down > len(self.planes["arrived"]) else min(c.split, blocks)
            tile[(across, down, split)](
                x, out, out if bias is None else bias, *self._read, self._sums(split, len(x)), self.planes["arrived"],
                out if order is None else order, out if places is None else places, len(x), outs, columns, stride,
                blocks, self.planes["scales"].shape[-2], **self._constants, BIAS=bias is not None,
                GROUPED=places is not None, M=c.m, N=c.n, SPLIT=split, num_warps=c.warps, num_stages=c.stages)

        with current(self.device):
            configs.fitting("tile", self.config("tile", len(x)), launch)

    def _sums(self, split: int, rows: int) -> torch.Tensor:
        size = split * rows * self.shape[-2] if split > 1 else 1
        return torch.empty(size, dtype=torch.float32, device=self.device)

    def grouped(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Every row of `x` `[n, in]` times the matrix of its expert, `experts` `[n]`: `[n, out]`. Nothing waits for the
        GPU: there are as many tiles of rows as there can be, and some of them are empty."""
        out = x.new_empty(len(x), self.shape[-2])
        if not len(x):
            return out
        count, m = self.shape[0], self.config("tile", len(x)).m
        order = torch.argsort(experts, stable=True).int()
        sizes = torch.zeros(count, dtype=torch.int64, device=x.device).index_add_(0, experts, torch.ones_like(experts))
        tiles = (sizes + m - 1) // m
        ends = tiles.cumsum(0)
        index = torch.arange(len(x) // m + min(count, len(x)), device=x.device)
        expert = torch.searchsorted(ends, index, right=True)
        spare = expert >= count
        expert = expert.clamp(max=count - 1)
        end = sizes.cumsum(0)[expert]
        first = end - sizes[expert] + (index - ends[expert] + tiles[expert]) * m
        places = torch.stack([expert, first, torch.minimum(first + m, end)], 1).masked_fill(spare[:, None], 0)
        self._tile(x, out, None, order, places.int())
        return out

    def gradient(self, g: torch.Tensor) -> torch.Tensor:
        """Gradient of the input `[n, in]` from that of the output, `g` `[n, out]`."""
        found: torch.Tensor | None = None
        for at, part in self._decoded(g.dtype):
            some = g[:, at:at + part.shape[1]]
            found = some @ part.T if found is None else found.addmm_(some, part.T)
        assert found is not None
        return found

    def _decoded(self, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """Outputs, some at a time: the first one's number, and `[in, outputs]` of `dtype`."""
        outs, columns, *_ = self._sizes
        step = max(WORDS, DECODED // columns // WORDS * WORDS)
        for at in range(0, outs, step):
            count = min(step, outs - at)
            part = torch.empty(columns, count, dtype=dtype, device=self.device)
            self._decode(part, None, count, 1, count, at)
            yield at, part

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Outputs `ids` `[n]`: `[n, in]`."""
        out = torch.empty(len(ids), self.shape[-1], dtype=dtype, device=self.device)
        self._decode(out, ids, len(ids), self.shape[-1], 1)
        return out

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix `[out, in]`."""
        return torch.cat([part.T for _, part in self._decoded(dtype)])

    def _decode(self, out: torch.Tensor, ids: torch.Tensor | None, count: int, across: int, down: int,
                first: int = 0) -> None:
        if not count:
            return
        _, columns, stride, blocks = self._sizes

        def launch(c: configs.Config) -> None:
            decode[(triton.cdiv(count, c.n), blocks)](
                out, out if ids is None else ids, *self._read, first, count, columns, stride, across, down,
                **self._constants, CHOSEN=ids is not None, N=c.n, num_warps=c.warps, num_stages=c.stages)

        with current(self.device):
            configs.fitting("decode", self.config("decode", 1), launch)
