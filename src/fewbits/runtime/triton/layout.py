"""Weights as the Triton kernels read them: codes in words, outputs side by side; a scale and an offset a group.

`value = row * (scale * level[code] + offset)`, a level often being code - zero; docs/concepts/gpu.md draws it. Grids of
codecs say what levels, scales and offsets are, so that no codec is named here.

Codes are cut into blocks of 16 words for each output. Word j of a block has `fields` codes, the first in the lowest
bits: field i is column 16 i + j of the block. All codes of a field so share a group of at least 16 columns, and
neighbouring lanes read neighbouring outputs. Codes of 3, 5 and 6 bits have their upper bits in a second plane of
narrower words of as many fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F

from fewbits.codecs.base import Codec, Grid, Params, Planes, units
from fewbits.codecs.codebook import CodebookGrid
from fewbits.codecs.decode_only import DecodeOnly
from fewbits.codecs.float8 import Float8Grid
from fewbits.codecs.floats import Float
from fewbits.codecs.grids import TableGrid, UniformGrid
from fewbits.codecs.mxfp4 import E2M1
from fewbits.codecs.w8a8 import W8A8
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor

WORDS = 16  # of a block: what a product of matrix units takes at once
LEAST = 16  # columns of a group
ALIGNED = 16  # outputs, to multiples of which planes are filled up: no vector of a load straddles
SPLIT = {1: (1, 0), 2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (8, 0)}  # lower and upper bits
NARROW = {8: torch.uint8, 16: torch.int16}  # words of upper bits
WITHOUT_NUMBER = {"e4m3": 0x7F, "e5m2": 0x7C}  # magnitudes from here on are NaN, or infinite
CHUNK = 1 << 23  # weights laid out at a time


@dataclass(frozen=True)
class Layout:
    """What kernels are compiled for."""

    bits: int
    group: int  # columns that share a scale; the whole row where they are at least the weight's
    levels: str = "line"  # code - zero; or "table", "rows" (a table for each output), "e4m3", "e5m2", "e2m1"
    zero: float = 0.0
    second: str = ""  # what stands beside the scales: "zeros" (uint8), "offsets" (float16, of code `zero`)

    @property
    def lower(self) -> int:
        return SPLIT[self.bits][0]

    @property
    def upper(self) -> int:
        return SPLIT[self.bits][1]

    @property
    def fields(self) -> int:
        """Codes of a word."""
        return 32 // self.lower

    @property
    def block(self) -> int:
        """Columns of a block."""
        return WORDS * self.fields


def unfit(q: QTensor) -> str | None:
    """Why a weight has no such layout, or None."""
    codec, shape = q.codec, q.shape
    if isinstance(codec, (Float, W8A8, DecodeOnly)):
        return f"no layout of {codec.name} for the GPU"
    if len(shape) not in (2, 3) or 0 in shape:
        return f"{list(shape)} is no matrix, nor a stack of matrices"
    rows, columns = math.prod(shape[:-1]), shape[-1]
    if codec.matrix(shape) != (rows, columns) or codec.check(shape):
        return f"blocks of {codec.name} cross rows of {columns} columns"
    if q.order is not None and q.order.ndim == 2:
        return "an order of columns for each row or expert"
    unit = codec.unit(columns)
    if unit < columns and math.gcd(unit, LEAST) < LEAST:
        return f"groups of {unit} columns are no multiples of {LEAST}"
    return None


def pack(q: QTensor) -> tuple[Layout, Planes, Params]:
    """The layout of `q` and its planes, on its device; beside them, on the CPU, the parameters that `unpack` needs.

    `words` (int32), `upper`, `scales` (float16) and `second` are `[..., entries, out filled up]`, `row` is float32
    `[..., out]`, `levels` float32 `[levels]`, or `[..., out, levels]`; `...` are the leading dimensions of a stack.

    Raises:
        FewbitsError: codes of small floats that are no finite numbers: the kernels have no such.
    """
    columns, found, kept = q.shape[-1], [], []
    layout = None
    for part in _parts(q):
        codes, params = part.unpack()
        kept.append({name: p.cpu() for name, p in params.items()})
        layout, planes = _numbers(q.codec.grid(params, q.codec.unit(columns)), q.codec.unit(columns), columns)
        if layout.levels in WITHOUT_NUMBER and bool((codes.bitwise_and(0x7F) >= WITHOUT_NUMBER[layout.levels]).any()):
            raise FewbitsError(f"weights in {q.codec.name} that are no finite numbers", "kernel='decode' computes them")
        planes["words"] = _words(codes, layout, layout.lower, torch.int32)
        if layout.upper:
            planes["upper"] = _words(codes >> layout.lower, layout, layout.upper, NARROW[layout.fields * layout.upper])
        found.append(planes)
    assert layout is not None
    rows, lead = q.shape[-2], q.shape[:-2]

    def whole(name: str) -> torch.Tensor:
        if name == "levels" and layout.levels == "table":
            return found[0][name]
        plane = torch.cat([planes[name] for planes in found]).unflatten(0, (*lead, rows))
        if name in ("row", "levels"):
            return plane
        return F.pad(plane.mT, (0, -rows % ALIGNED)).contiguous()

    order = ("words", "upper", "scales", "second", "levels", "row")
    parameters = {name: torch.cat([params[name] for params in kept]) for name in kept[0]}
    return layout, {name: whole(name) for name in order if name in found[0]}, parameters


@cache
def row_bytes(codec: Codec, columns: int) -> float:
    """Bytes of all planes, for each output."""
    shape = (ALIGNED, columns)
    empty = {name: torch.zeros(size, dtype=getattr(torch, kind)) for name, (kind, size) in codec.planes(shape).items()}
    _, planes, _ = pack(QTensor(codec, shape, empty))
    return sum(p.numel() * p.element_size() for p in planes.values()) / ALIGNED


def unpack(layout: Layout, planes: Planes, shape: tuple[int, ...]) -> torch.Tensor:
    """The codes of `pack`, uint8 `[rows, columns]`."""
    def fields(plane: torch.Tensor, bits: int) -> torch.Tensor:
        words = plane[..., :shape[-2]].mT.flatten(0, -2).int().unflatten(-1, (-1, 1, WORDS))  # [rows, blocks, 1, 16]
        shifts = torch.arange(layout.fields, device=plane.device).view(-1, 1) * bits
        return ((words >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :shape[-1]].to(torch.uint8)

    codes = fields(planes["words"], layout.lower)
    return codes | (fields(planes["upper"], layout.upper) << layout.lower) if layout.upper else codes


def _parts(q: QTensor) -> Iterator[QTensor]:
    """Some rows after the others, where the codec packs them apart."""
    stored = replace(q, order=None)
    rows, columns = q.codec.matrix(q.shape)
    if not q.codec.rows_apart(q.shape):
        yield stored
        return
    step = max(1, CHUNK // columns)
    for at in range(0, rows, step):
        yield stored.part(slice(at, min(at + step, rows)))


def _words(codes: torch.Tensor, layout: Layout, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """`[rows, words]`: the lowest `bits` of each code."""
    columns = codes.shape[1]
    blocks = F.pad(codes, (0, -columns % layout.block)).unflatten(1, (-1, layout.fields, WORDS))
    words = torch.zeros(len(codes), blocks.shape[1], WORDS, dtype=torch.int32, device=codes.device)
    for i in range(layout.fields):
        words |= (blocks[:, :, i].int() & ((1 << bits) - 1)) << (i * bits)
    return words.flatten(1).to(dtype)  # of narrow words the uppermost bit is a sign as well


def _numbers(grid: Grid, unit: int, columns: int) -> tuple[Layout, Planes]:
    """Of rows whose grids are known: `[rows, groups]` each, `row` `[rows]`, `levels`."""
    if isinstance(grid, CodebookGrid):
        levels = grid.levels[:, 0]
        layout = Layout(levels.shape[-1].bit_length() - 1, columns, "rows")
        one = torch.ones(len(levels), 1, device=levels.device)
        return _finish(layout, {"levels": levels}, one, unit, columns)
    if isinstance(grid, Float8Grid):
        return _finish(Layout(8, columns, grid.kind.name), {}, grid.scale.flatten(1), unit, columns)
    assert isinstance(grid, (UniformGrid, TableGrid))
    each = unit // grid.scale.shape[-1]
    scale = grid.scale.float().flatten(1)
    if isinstance(grid, TableGrid):
        table = grid.table.table.to(scale.device, torch.float32)
        if grid.table.table.tolist() == list(E2M1):
            return _finish(Layout(4, columns, "e2m1"), {}, 2 * scale, each, columns)
        return _finish(Layout((len(table) - 1).bit_length(), columns, "table"), {"levels": table}, scale, each, columns)
    bits, zero = grid.high.bit_length(), grid.zero
    if grid.offset is not None:
        assert isinstance(zero, float)
        scale, middle = scale * grid.factor, float(1 << (bits - 1))
        offset = grid.offset.flatten(1) + scale * (middle - zero)  # of the middle code: it is small, and rounds finely
        return _finish(Layout(bits, columns, zero=middle, second="offsets"), {"second": offset}, scale, each, columns)
    if isinstance(zero, float):
        return _finish(Layout(bits, columns, zero=zero), {}, scale * grid.factor, each, columns)
    return _finish(Layout(bits, columns, second="zeros"), {"second": zero.flatten(1).to(torch.uint8)},
                   scale * grid.factor, each, columns)


def _finish(layout: Layout, planes: Planes, scale: torch.Tensor, each: int, columns: int) -> tuple[Layout, Planes]:
    """Scales, `each` columns one, and offsets in float16, over what of them is the row's; a power of two of it, but all
    of it where the row has one scale."""
    block, wide = layout.block, units(columns, layout.block) * layout.block
    group = wide if each >= columns else each if each % block == 0 or block % each == 0 else math.gcd(each, block)
    offsets = planes.get("second") if layout.second == "offsets" else None
    largest = scale.abs() if offsets is None else torch.maximum(scale.abs(), offsets.abs())
    largest = largest.amax(1, keepdim=True)
    largest = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
    one = scale.shape[1] == 1 and offsets is None
    row = torch.where(scale == 0, 1.0, scale) if one else torch.exp2(torch.frexp(largest)[1].float())
    planes["scales"] = scale / row
    if offsets is not None:
        planes["second"] = offsets / row
    for name in ("scales", "second"):
        if name in planes:
            many = planes[name].repeat_interleave(max(1, each // group), 1)[:, :units(wide, group)]
            many = F.pad(many, (0, units(wide, group) - many.shape[1]))
            planes[name] = many if name == "second" and layout.second == "zeros" else many.to(torch.float16)
    return replace(layout, group=group), planes | {"row": row[:, 0]}
