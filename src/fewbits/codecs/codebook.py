"""Codebooks: every row has 2^k levels of its own in float16, and k-bit codes that name them.

Weight sharing by k-means (Han et al., 2016, arXiv 1510.00149), a row at a time: in one dimension the best clusters are
runs of the sorted weights, so prefix sums make every step cheap.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from fewbits.codecs.base import Codec, Grid, Params, Planes, Shape
from fewbits.codecs.packing import pack_bits, packed_bytes, unpack_bits
from fewbits.codecs.pieces import FLOAT16_MAX, LEAST_WEIGHT
from fewbits.lazy import torch

CUTS = 64  # places between sorted weights where the first clusters may end
ROUNDS = 30  # of Lloyd's algorithm, at most
ROWS = 256  # of a weight that are clustered at a time


class CodebookGrid(Grid):
    """`value = levels[code]`, levels `[..., 2^k]` in any order, perhaps repeated."""

    def __init__(self, levels: torch.Tensor):
        self.levels = levels.float()
        ranked, self.order = self.levels.sort(dim=-1, stable=True)
        self.bounds = ((ranked[..., 1:] + ranked[..., :-1]) / 2).contiguous()

    def encode(self, w: torch.Tensor) -> torch.Tensor:
        rank = torch.searchsorted(self.bounds, w.float().contiguous())
        return self.order.gather(-1, rank).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.levels.gather(-1, codes.long())

    def columns(self, index: torch.Tensor | slice) -> Grid:
        return self


@dataclass(frozen=True)
class Codebook(Codec):
    """`levels[code]`, 2^bits levels a row."""

    bits: int
    family: ClassVar[str] = "codebook"

    @property
    def integer_bits(self) -> int:  # type: ignore[override]
        return self.bits

    @property
    def name(self) -> str:
        return f"kmeans{self.bits}"

    def unit(self, columns: int) -> int:
        return max(1, columns)

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Params | None = None) -> Params:
        weight = _weights(w, importance)
        lead, width = w.shape[:-1], w.shape[-1]
        parts = zip(w.reshape(-1, width).split(ROWS), weight.reshape(-1, width).split(ROWS), strict=True)
        levels = torch.cat([_stored(kmeans(x.double(), v, 1 << self.bits)) for x, v in parts])
        return {"levels": levels.reshape(*lead, -1)}

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, importance: torch.Tensor | None) -> Params:
        """Every level the mean of its weights; levels without any stay."""
        weight, index = _weights(w, importance), codes.long()
        mass = torch.zeros(params["levels"].shape, dtype=torch.float64, device=w.device)
        moment = mass.clone().scatter_add_(-1, index, weight * w.double())
        mass.scatter_add_(-1, index, weight)
        return {"levels": torch.where(mass > 0, _stored(moment / mass), params["levels"])}

    def basis(self, codes: torch.Tensor, params: Params) -> Params:
        return {"levels": torch.nn.functional.one_hot(codes.long(), 1 << self.bits).mT.float()}

    def grid(self, params: Params, columns: int) -> Grid:
        return CodebookGrid(params["levels"])

    def pack(self, codes: torch.Tensor, params: Params, shape: Shape) -> Planes:
        return {"codes": pack_bits(codes, self.bits), "levels": params["levels"][:, 0].contiguous()}

    def unpack(self, planes: Planes, shape: Shape) -> tuple[torch.Tensor, Params]:
        return unpack_bits(planes["codes"], self.bits, shape[-1]), {"levels": planes["levels"].unsqueeze(1)}

    def planes(self, shape: Shape) -> dict[str, tuple[str, Shape]]:
        rows, columns = self.matrix(shape)
        return {"codes": ("uint8", (rows, packed_bytes(columns, self.bits))),
                "levels": ("float16", (rows, 1 << self.bits))}


def _weights(w: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """What each of `w` counts, float64; rows without a single positive importance count evenly."""
    if importance is None:
        return torch.ones(w.shape, dtype=torch.float64, device=w.device)
    weight = importance.double().expand(w.shape)
    most = weight.amax(-1, keepdim=True)
    return torch.where(most > 0, weight / most.clamp(min=1e-300), 1.0).clamp(min=LEAST_WEIGHT)


def _stored(levels: torch.Tensor) -> torch.Tensor:
    return levels.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)


# one-dimensional k-means over sorted values ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Sums:
    """Sums over the first i of the sorted values of every row, i = 0 … n: of weights, weighted values and squares."""

    x: torch.Tensor  # [rows, n], ascending
    mass: torch.Tensor  # [rows, n + 1]
    first: torch.Tensor
    second: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, weight: torch.Tensor) -> Sums:
        x, order = x.contiguous().sort(-1)
        weight = weight.gather(-1, order)
        return cls(x, *(torch.nn.functional.pad(t.cumsum(-1), (1, 0)) for t in (weight, weight * x, weight * x * x)))


def kmeans(x: torch.Tensor, weight: torch.Tensor, k: int) -> torch.Tensor:
    """`k` levels `[rows, k]` for float64 values and positive weights `[rows, n]`, of nearly the least weighted squared
    error: the best clusters that end at some `CUTS` places, improved by Lloyd's algorithm."""
    peak = x.abs().amax(-1, keepdim=True)
    peak = torch.where(peak > 0, peak, 1.0)
    sums = Sums.of(x / peak, weight)
    ends = best_runs(sums, cuts(sums), k)  # [rows, k - 1]
    for _ in range(ROUNDS):
        levels = means(sums, ends)
        moved = torch.searchsorted(sums.x, (levels[:, 1:] + levels[:, :-1]) / 2)
        if torch.equal(moved, ends):
            break
        ends = moved
    return means(sums, ends) * peak


def cuts(sums: Sums) -> torch.Tensor:
    """Places `[rows, c]`, from 0 to n, at which clusters may end, ascending.

    Half of them as dense as the levels of the best fine quantizer, the cube root of the density of values (Panter and
    Dite, 1951); half spread over the places where neighbours differ, so that few distinct values are all told apart.
    """
    rows, n = sums.x.shape
    if n <= CUTS:
        return torch.arange(n + 1, device=sums.x.device).expand(rows, n + 1)
    gap = sums.x.diff(dim=-1)  # [rows, n - 1]
    density = gap.pow(2 / 3) * (sums.mass[:, 1:-1] - sums.mass[:, :-2]).pow(1 / 3)
    apart = (gap > 0).double()
    floor = density.sum(-1, keepdim=True) / apart.sum(-1, keepdim=True).clamp(min=1)
    passed = (density + floor * apart).cumsum(-1)
    marks = torch.arange(1, CUTS, device=gap.device) / CUTS * passed[:, -1:]
    inner = torch.searchsorted(passed, marks.contiguous()) + 1  # a jump after value i is place i + 1
    return torch.nn.functional.pad(torch.nn.functional.pad(inner.clamp(max=n - 1), (1, 0)), (0, 1), value=n)


def best_runs(sums: Sums, places: torch.Tensor, k: int) -> torch.Tensor:
    """Where the first k - 1 of the `k` best clusters end, `[rows, k - 1]`: the best of all `places`."""
    mass, first, second = (t.gather(-1, places) for t in (sums.mass, sums.first, sums.second))

    def between(t: torch.Tensor) -> torch.Tensor:
        return t[:, None, :] - t[:, :, None]  # [rows, from, to]

    cost = between(second) - between(first).square() / between(mass).clamp(min=1e-300)
    count = places.shape[1]
    cost = cost.clamp_(min=0).masked_fill_(torch.ones(count, count, dtype=torch.bool, device=cost.device).tril(-1),
                                           torch.inf)
    cost = cost.float()
    total, came = cost[:, 0], []
    for _ in range(k - 1):
        total, before = (total[:, :, None] + cost).min(1)
        came.append(before)
    at = torch.full_like(places[:, :1], count - 1)
    ends = []
    for before in reversed(came):
        at = before.gather(-1, at)
        ends.append(places.gather(-1, at))
    return torch.cat(ends[::-1], -1)


def means(sums: Sums, ends: torch.Tensor) -> torch.Tensor:
    """The mean of every cluster, ascending; a cluster without values has that of the place where it is."""
    n = sums.x.shape[1]
    edges = torch.nn.functional.pad(torch.nn.functional.pad(ends, (1, 0)), (0, 1), value=n)
    mass, first = (t.gather(-1, edges).diff(dim=-1) for t in (sums.mass, sums.first))
    empty = edges.diff(dim=-1) == 0
    here = sums.x.gather(-1, edges[:, :-1].clamp(max=n - 1))
    return torch.where(empty, here, first / torch.where(empty, 1.0, mass))


_NAME = re.compile(r"kmeans([234])")


def parse(name: str) -> Codec | None:
    match = _NAME.fullmatch(name.lower())
    return Codebook(int(match[1])) if match else None
