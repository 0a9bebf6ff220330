"""Eight-bit floats: `float8 * scale`, one float32 scale a row, or one a square tile (DeepSeek, Transformers).

E4M3 (the "fn" kind: no infinities, largest 448, NaN is 0x7F and 0xFF) and E5M2 (IEEE-like: largest 57344, infinities
0x7C and 0xFC). Micikevicius et al., 2022 (arXiv 2209.05433). A code is the float8's byte.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fewbits.codecs import base
from fewbits.codecs.base import Codec, Grid, Params, Planes, Shape
from fewbits.codecs.pieces import TINY, Piece, fit_pieces, invert, pick
from fewbits.codecs.search import ratios, refit_scale
from fewbits.errors import FewbitsError
from fewbits.lazy import torch

# Levels on which the largest magnitude is put, as parts of the largest level: what lies an octave below repeats itself,
# and beyond 1 the largest are clipped, which importances may forgive.
STARTS = ratios(0.5, 1.12, 20)
WEIGHTED_STARTS = ratios(0.5, 2.0, 32)
POLISHED = 3  # best starts that are tried with what least squares makes of them


@dataclass(frozen=True)
class Kind:
    """One float8 type."""

    name: str
    dtype_name: str
    top: float  # largest finite value
    significant: int  # bits, the leading one counted
    least: float  # smallest normal number

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype_name)

    def rounded(self, u: torch.Tensor) -> torch.Tensor:
        """`u` clamped and rounded to this type, in float32: the cast there and back is an order of magnitude slower."""
        u = u.clamp(-self.top, self.top)
        far = u * (2.0 ** (24 - self.significant) + 1)  # Dekker's split: the leading bits, rounded to nearest even
        leading = far - (far - u)
        step = self.least * 2.0 ** (1 - self.significant)  # below the normal numbers levels are evenly spaced
        shift = 1.5 * 2.0 ** 23 * step
        return torch.where(u.abs() < self.least, (u + shift) - shift, leading)


KINDS = {"e4m3": Kind("e4m3", "float8_e4m3fn", 448.0, 4, 2.0 ** -6),
         "e5m2": Kind("e5m2", "float8_e5m2", 57344.0, 3, 2.0 ** -14)}


class Float8Grid(Grid):
    """`value = float8 * scale`, scale `[..., 1]`. Finite weights never become NaN or infinite: the ends saturate."""

    def __init__(self, scale: torch.Tensor, kind: Kind):
        self.scale, self.kind = scale, kind

    def encode(self, w: torch.Tensor) -> torch.Tensor:
        step = torch.where(self.scale == 0, torch.inf, self.scale)
        u = (w.float() / step).clamp_(-self.kind.top, self.kind.top)
        return u.to(self.kind.dtype).view(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.view(self.kind.dtype).float().mul_(self.scale)

    def columns(self, index: torch.Tensor | slice) -> Grid:
        return self


@dataclass(frozen=True)
class Float8(Codec):
    """One float32 scale a row."""

    kind: Kind
    linear: ClassVar[tuple[str, ...]] = ("scale",)
    shared: ClassVar[str] = "fp8"  # family of those that other programs read

    @property
    def family(self) -> str:  # type: ignore[override]
        return self.shared if self.kind.name == "e4m3" else "fp8-e5m2"

    @property
    def name(self) -> str:
        return f"fp8-{self.kind.name}"

    def unit(self, columns: int) -> int:
        return max(1, columns)

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Params | None = None) -> Params:
        return fit_pieces(self._fit, w, importance, torch.float32)

    def _fit(self, p: Piece) -> Params:
        """The scale of least error, never worse than the largest magnitude on the largest level."""
        starts = STARTS if p.weight is None else WEIGHTED_STARTS
        total = p.sum(p.weighted(p.x * p.x))
        errors, found = [], []
        for part in starts:
            s = p.x.new_full((len(p.x), 1), 1 / (part * self.kind.top))
            q = self.kind.rounded(p.x * invert(s))
            v = p.weighted(q)
            cross, square = p.sum(v * p.x), p.sum(v * q).clamp_(min=TINY)
            errors.append(total - cross * cross / square)  # of the best scale for these codes
            found.append(cross / square)
        order = torch.stack(errors).argsort(0)[:POLISHED]
        best = torch.stack(found).gather(0, order)
        plain = torch.full_like(best[:1], 1 / self.kind.top)
        tries = torch.cat([plain, best])
        exact = [p.error(self.kind.rounded(p.x * invert(k)) * k - p.x) for k in map(p.kept, tries)]
        return {"scale": p.stored(pick(torch.stack(exact), tries)[1])}

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, importance: torch.Tensor | None) -> Params:
        levels = codes.view(self.kind.dtype).float()
        return {"scale": refit_scale(w, levels, params["scale"], 0.0, importance)}

    def grid(self, params: Params, columns: int) -> Grid:
        return Float8Grid(params["scale"], self.kind)

    def pack(self, codes: torch.Tensor, params: Params, shape: Shape) -> Planes:
        return {"codes": codes, "scales": params["scale"][..., 0].contiguous()}

    def unpack(self, planes: Planes, shape: Shape) -> tuple[torch.Tensor, Params]:
        return planes["codes"], {"scale": planes["scales"].unsqueeze(-1)}

    def planes(self, shape: Shape) -> dict[str, tuple[str, Shape]]:
        rows, columns = self.matrix(shape)
        return {"codes": ("uint8", (rows, columns)), "scales": ("float32", (rows, 1))}


@dataclass(frozen=True)
class Float8Tiles(Float8):
    """One float32 scale a tile of `tile` x `tile` weights; tiles at the lower and right edge may be cut.

    A matrix `[..., out, in]` is tiled for itself: `scales` is `[matrices * row tiles, column tiles]`.
    """

    tile: int = 128
    linear: ClassVar[tuple[str, ...]] = ()  # rows share scales
    shared: ClassVar[str] = "fp8-tiles"

    @property
    def name(self) -> str:
        return f"{super().name}-b{self.tile}"

    def unit(self, columns: int) -> int:
        return max(1, min(self.tile, columns))

    def rows_apart(self, shape: Shape) -> bool:
        return False

    def stacks(self, shape: Shape) -> bool:
        return True

    def begin(self, w: torch.Tensor, importance: torch.Tensor | None) -> Params | None:
        """The scale of every tile of one matrix, given to each of its rows."""
        rows, columns = w.shape
        scales = torch.empty(base.units(rows, self.tile), base.units(columns, self.tile), device=w.device)
        for down, across, height, width, at in self._tiles(rows, columns):
            def cut(x: torch.Tensor) -> torch.Tensor:
                tiles = x[down, across].unflatten(0, (-1, height)).unflatten(-1, (-1, width))  # noqa: B023
                return tiles.transpose(1, 2).flatten(2)  # [row tiles, column tiles, weights]

            weight = None if importance is None else cut(importance.expand(w.shape))
            scales[at] = fit_pieces(self._fit, cut(w), weight, torch.float32)["scale"][..., 0]
        return {"scale": scales.repeat_interleave(self.tile, 0)[:rows].unsqueeze(-1)}

    def _tiles(self, rows: int, columns: int) -> Iterator[tuple[slice, slice, int, int, tuple[slice, slice]]]:
        """Runs of tiles of equal size: their rows and columns, height and width, and place among the tiles."""
        for down, above, height in base.spans(rows, self.tile):
            for start in range(down.start, down.stop, height):  # a row of tiles at a time
                i = above.start + (start - down.start) // height
                for across, left, width in base.spans(columns, self.tile):
                    yield slice(start, start + height), across, height, width, (slice(i, i + 1), left)

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Params | None = None) -> Params:
        if state is None:
            raise ValueError(f"{self.name}: tiles need the scales that begin() returns")
        return {"scale": state["scale"]}

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, importance: torch.Tensor | None) -> Params:
        return params

    def pack(self, codes: torch.Tensor, params: Params, shape: Shape) -> Planes:
        matrices, rows = self._stack(shape)
        scales = params["scale"][..., 0].unflatten(0, (matrices, rows))[:, ::self.tile]
        return {"codes": codes, "scales": scales.flatten(0, 1).contiguous()}

    def unpack(self, planes: Planes, shape: Shape) -> tuple[torch.Tensor, Params]:
        matrices, rows = self._stack(shape)
        scales = planes["scales"].unflatten(0, (matrices, -1)).repeat_interleave(self.tile, 1)[:, :rows]
        return planes["codes"], {"scale": scales.flatten(0, 1).unsqueeze(-1)}

    def planes(self, shape: Shape) -> dict[str, tuple[str, Shape]]:
        matrices, rows = self._stack(shape)
        tiles = (matrices * base.units(rows, self.tile), base.units(shape[-1], self.tile))
        return {"codes": ("uint8", self.matrix(shape)), "scales": ("float32", tiles)}

    def _stack(self, shape: Shape) -> tuple[int, int]:
        """Matrices, and rows of each."""
        return math.prod(shape[:-2]), shape[-2] if len(shape) > 1 else 1


_NAME = re.compile(r"fp8(?:-(e4m3|e5m2))?(?:-b(\d+))?")


def parse(name: str) -> Codec | None:
    match = _NAME.fullmatch(name.lower())
    if match is None:
        return None
    kind, tile = KINDS[match[1] or "e4m3"], match[2]
    if tile is None:
        return Float8(kind)
    if int(tile) == 0:
        raise FewbitsError(f"codec {name!r}: tiles of 0 weights", f"for example: fp8-{kind.name}-b128")
    return Float8Tiles(kind, int(tile))
