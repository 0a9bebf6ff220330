"""The native kernel of CPUs: products of bytes on an interleaved layout that takes the place of the file's bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from fewbits import _native
from fewbits.codecs.base import Params, Planes, units
from fewbits.errors import FewbitsError
from fewbits.instructions import threads
from fewbits.qtensor import QTensor
from fewbits.runtime import blocks
from fewbits.runtime.interleaved import BLOCK, TILE, Form, form, scale_name, unfit, weight
from fewbits.runtime.reference import Kernel, Prepared

CHUNK = 1 << 22  # weights unpacked at a time while preparing
OUTLIER = 6.0  # LLM.int8(): columns of activations that reach it are multiplied in floating point
DECODED = 1 << 18  # weights decoded at a time for gradients: they stay in the second cache


@dataclass(frozen=True)
class Matrix:
    """A matrix `[rows, columns]` in the native layout: planes, uint8 and flat, and what the kernels know of it."""

    form: Form
    rows: int
    columns: int
    unit: int  # columns that share a scale
    dtype: torch.dtype  # of the scales
    planes: dict[str, torch.Tensor]

    @cached_property
    def weight(self) -> _native.Weight:
        return weight(self.form, self.rows, self.columns, self.unit, scale_name(self.dtype), self.planes)

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` `[n]`, float32 `[n, columns]`."""
        out = torch.empty(len(ids), self.columns)
        self.weight.rows(ids.long().contiguous(), out, threads())
        return out

    def decode_columns(self, ids: torch.Tensor) -> torch.Tensor:
        """Columns `ids` `[n]`, float32 `[n, rows]`."""
        out = torch.empty(len(ids), self.rows)
        self.weight.columns(ids.long().contiguous(), out, threads())
        return out


class _Planes:
    """Planes of a matrix that is filled from its first row on."""

    def __init__(self, f: Form, rows: int, columns: int):
        self.form, self.rows, self.columns, self.at = f, rows, columns, 0
        self.tiles = units(rows, TILE)
        self.codes = _empty(self.tiles * self._record)
        self.planes: dict[str, torch.Tensor] = {}

    @property
    def _record(self) -> int:
        return units(self.columns, BLOCK) * 64 * self.form.bits

    def add(self, codes: torch.Tensor, params: Params) -> None:
        """Further rows, a multiple of `TILE` of them unless they are the last."""
        first, count = self.at // TILE, units(len(codes), TILE)
        part = self.codes[first * self._record:(first + count) * self._record]
        _native.interleave(codes.contiguous(), self.form.bits, part)
        for name, values in self.form.to_planes(params).items():
            padded = F.pad(values, (0, 0, 0, count * TILE - len(values)))
            tiles = padded.view(count, TILE, -1).mT.contiguous()  # [tiles, entries, 16]
            whole = self.planes.setdefault(name, tiles.new_empty(self.tiles, *tiles.shape[1:]))
            whole[first:first + count] = tiles
        self.at += len(codes)

    def matrix(self, unit: int) -> Matrix:
        planes = {name: plane.view(torch.uint8).view(-1) for name, plane in self.planes.items()}
        return Matrix(self.form, self.rows, self.columns, unit, self.planes["scales"].dtype,
                      {"codes": self.codes, **planes})


def _empty(nbytes: int) -> torch.Tensor:
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    _native.advise(buffer)
    return buffer


def multiply(matrices: Sequence[Matrix], x: torch.Tensor, biases: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Products of float32 rows `x` `[n, in]` with several matrices that read the same: `[n, out]` each."""
    outs = [torch.empty(len(x), m.rows) for m in matrices]
    rounded = _native.Rounded(x, threads())
    _native.multiply([m.weight for m in matrices], rounded, outs, biases, threads())
    return outs


def far_columns(x: torch.Tensor, threshold: float | None) -> torch.Tensor:
    """The columns of `x` `[n, in]` with a magnitude of at least `threshold`, or a NaN; none where that is None or 0."""
    if not threshold or not len(x):
        return torch.empty(0, dtype=torch.long, device=x.device)
    return (~(x.abs().amax(0) < threshold)).nonzero()[:, 0]


class Native:
    """A prepared weight `[out, in]`, or a stack of them `[experts, out, in]`.

    Of `int8`, columns of activations that reach `outliers` are multiplied in floating point; None or 0: none are.
    """

    outliers: float | None = OUTLIER

    def __init__(self, q: QTensor, dtype: torch.dtype):
        f = form(q.codec)
        assert f is not None
        self.codec, self.shape, self.dtype, self.order = q.codec, q.shape, dtype, q.order
        self.kept: Params = {}
        self.matrices = [self._prepare(q, f, i) for i in range(math.prod(q.shape[:-2]))]

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.q, self.dtype, self.outliers)

    def _prepare(self, q: QTensor, f: Form, index: int) -> Matrix:
        rows, columns = self.shape[-2:]
        if blocks.natively(q.codec) is not None:
            data = q.planes["blocks"][index * rows:(index + 1) * rows].contiguous().numpy()
            found = blocks.planes(q.codec, [data], rows, columns)
            return Matrix(f, rows, columns, q.codec.unit(columns), getattr(torch, blocks.FIELDS[q.codec.name].kind),
                          {name: torch.from_numpy(plane) for name, plane in found.items()})
        planes = _Planes(f, rows, columns)
        stored = QTensor(q.codec, q.shape, q.planes)
        if not q.codec.rows_apart(q.shape):  # nested absmax: one tensor, not a stack
            codes, params = stored.unpack()
            self.kept = {name: params[name] for name in f.kept}
            planes.add(codes, params)
        else:
            step = max(TILE, CHUNK // columns // TILE * TILE)
            for at in range(0, rows, step):
                part = stored.part(slice(index * rows + at, index * rows + min(at + step, rows)))
                planes.add(*part.unpack())
        return planes.matrix(q.codec.unit(columns))

    @property
    def planes(self) -> Planes:
        """The planes of the matrix; of a stack, numbered ones."""
        if len(self.shape) == 2:
            return self.matrices[0].planes
        return {f"{name}_{i}": plane for i, m in enumerate(self.matrices) for name, plane in m.planes.items()}

    @property
    def q(self) -> QTensor:
        """The tensor in its canonical layout, made again from the native one."""
        parts = [self._unpack(m) for m in self.matrices]
        codes = torch.cat([codes for codes, _ in parts])
        params = {name: torch.cat([p[name] for _, p in parts]) for name in parts[0][1]}
        return QTensor(self.codec, self.shape, self.codec.pack(codes, params | self.kept, self.shape), self.order)

    def _unpack(self, m: Matrix) -> tuple[torch.Tensor, Params]:
        codes = torch.empty(m.rows, m.columns, dtype=torch.uint8)
        _native.deinterleave(m.planes["codes"], m.form.bits, codes)
        kinds = {"subscales": torch.int8 if m.form.scaling == "small" else torch.uint8, "submins": torch.uint8,
                 "scales": m.dtype, "mins": torch.uint8 if m.form.scaling == "zeros" else m.dtype}
        tiles = units(m.rows, TILE)
        planes = {name: plane.view(kinds[name]).view(tiles, -1, TILE).mT.flatten(0, 1)[:m.rows]
                  for name, plane in m.planes.items() if name != "codes"}
        return codes, m.form.to_params(planes, units(m.columns, m.unit))

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if len(self.shape) != 2:
            raise FewbitsError(f"a stack of {self.shape[0]} matrices needs the expert of every row", "use grouped()")
        flat = self._rows(x)
        return self._product(self.matrices[0], flat, bias, self.order).view(*x.shape[:-1], self.shape[-2]).to(x.dtype)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.shape[-1]:
            raise FewbitsError(f"activations of {x.shape[-1]} columns, a weight of {self.shape[-1]}")
        return x.detach().reshape(-1, self.shape[-1]).float()

    def _product(self, m: Matrix, x: torch.Tensor, bias: torch.Tensor | None,
                 order: torch.Tensor | None) -> torch.Tensor:
        if order is not None:
            x = x.index_select(1, order)
        if bias is not None:
            bias = bias.detach().float().contiguous()
        if self.codec.family != "int8" or not len(x):
            return multiply([m], x.contiguous(), [bias])[0]
        far = far_columns(x, self.outliers)
        if not len(far):
            return multiply([m], x.contiguous(), [bias])[0]
        near = x.index_fill(1, far, 0.0)
        return multiply([m], near, [bias])[0].addmm_(x[:, far], m.decode_columns(far))

    def grad_input(self, g: torch.Tensor) -> torch.Tensor:
        if len(self.shape) != 2 or g.shape[-1] != self.shape[0]:
            raise FewbitsError(f"a gradient of {g.shape[-1]} columns for a weight {list(self.shape)}")
        flat, m = g.reshape(-1, g.shape[-1]).float(), self.matrices[0]
        out = torch.zeros(len(flat), m.columns)
        tiles = units(m.rows, TILE)
        step = min(tiles, max(1, DECODED // m.columns // TILE))
        buffer = torch.empty(step * TILE * m.columns)
        for at in range(0, tiles, step):
            part = flat[:, at * TILE:(at + step) * TILE]
            turned = buffer[:min(step, tiles - at) * TILE * m.columns].view(m.columns, -1)
            m.weight.turned(at, turned, threads())
            out.addmm_(part, turned.T[:part.shape[1]])
        return self._ordered(out).view(*g.shape[:-1], self.shape[-1]).to(g.dtype)

    def _ordered(self, values: torch.Tensor) -> torch.Tensor:
        """Columns as they are in the weight, of values as they are stored."""
        return values if self.order is None else values.index_select(1, torch.argsort(self.order))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.shape[0]:
            raise FewbitsError(f"rows {int(ids.min())} … {int(ids.max())} of a weight of {self.shape[0]}")
        found = self.matrices[0].decode(ids.reshape(-1))
        return self._ordered(found).view(*ids.shape, self.shape[-1]).to(self.dtype)

    def grouped(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Every row of `x` `[n, in]` times the matrix of its expert, `experts` `[n]`: `[n, out]`."""
        flat, count = self._rows(x), len(self.matrices)
        if experts.shape != x.shape[:1]:
            raise FewbitsError(f"experts {list(experts.shape)} for {list(x.shape)} activations", "one for each row")
        for wrong in experts[(experts < 0) | (experts >= count)].tolist()[:1]:
            raise FewbitsError(f"expert {wrong} of {count}")
        by_expert = torch.argsort(experts, stable=True)
        flat, sizes = flat[by_expert], torch.bincount(experts, minlength=count).tolist()
        if self.order is not None:
            flat = flat.gather(1, self.order.expand(count, -1)[experts[by_expert]])
        found = torch.empty(len(x), self.shape[-2])
        if self.codec.family == "int8":  # each expert leaves out columns of its own
            parts = zip(self.matrices, flat.split(sizes), found.split(sizes), strict=True)
            for m, rows, to in parts:
                to.copy_(self._product(m, rows, None, None))
        else:
            _native.grouped([m.weight for m in self.matrices], sizes, flat, found, threads())
        return torch.empty_like(found).index_copy_(0, by_expert, found).to(x.dtype)


def _again(q: QTensor, dtype: torch.dtype, outliers: float | None) -> Native:
    found = Native(q, dtype)
    found.outliers = outliers
    return found


class Cpu(Kernel):
    """Activations rounded to bytes, 32 columns a scale; weights as they are, but levels of tables rounded to bytes."""

    name = "native"

    def supports(self, q: QTensor, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"not on {device.type}"
        if q.order is not None and q.order.ndim == 2 and len(q.shape) == 2:
            return "an order of columns for each row"
        return unfit(q.codec, q.shape)

    def prepare(self, q: QTensor, dtype: torch.dtype) -> Prepared:
        return Native(q, dtype)
