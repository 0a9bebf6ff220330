"""Tensors of a checkpoint for native code: matrices in the layout of its kernels, vectors in float32.

What lies in its file as the kernels can take it (ggml's types, floats) is taken from there, without torch.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from fewbits import _native
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.affine import IntK
from fewbits.codecs.floats import F32, Float
from fewbits.codecs.table import Table
from fewbits.containers.experts import expert
from fewbits.lazy import torch
from fewbits.memory import available_bytes
from fewbits.qtensor import QTensor
from fewbits.runtime import blocks
from fewbits.runtime.interleaved import SCALES, form, scale_name, unfit, weight
from fewbits.stored import Apart, Stored

Weight = _native.Weight | _native.Floats
KINDS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def matrix(entry: Entry, rows: slice | np.ndarray | None = None, expert: bool = False) -> Weight:
    """A matrix `[out, in]`, or the rows of it that `rows` (int64) numbers: parts of a fused one, another order.

    Floats stay where they are in a mapped file, unless their rows are in another order.
    """
    stored = _stored(entry)
    if stored is not None:
        return _from_file(_rows(stored, rows))
    apart = None if rows is not None or expert and entry.codec.family == "int8" else entry.stored()
    made = _from_parts(apart) if isinstance(apart, Apart) else None
    if made is not None:
        return made
    q = entry.load()
    if rows is None:
        return _prepared(q, expert)
    return _prepared(rows_apart(q).part(rows if isinstance(rows, slice) else torch.from_numpy(rows)))


def expect(checkpoint: Checkpoint) -> None:
    """Let another thread fill in pages for the planes of a model that is about to be compiled: systems take as long for
    fresh memory as the kernels for laying weights out."""
    needed = sum(blocks.lined(blocks.sizes(e.codec, math.prod(e.shape[:-1]), e.shape[-1]))
                 for e in checkpoint.entries.values() if len(e.shape) > 1 and blocks.natively(e.codec))
    if 0 < needed < available_bytes() // 2:
        _native.expect(needed)


def _rows(stored: Stored, rows: slice | np.ndarray | None) -> Stored:
    if isinstance(rows, slice):
        return stored.part(rows.start, rows.stop)
    return stored if rows is None else stored.pick(rows)


def matrices(entry: Entry) -> list[Weight]:
    """A stack `[experts, out, in]`, one after the other."""
    count, rows = entry.shape[:2]
    stored = _stored(entry)
    if stored is not None:
        return [_from_file(stored.part(i * rows, (i + 1) * rows)) for i in range(count)]
    q = entry.load()
    return [_prepared(expert(q, i), True) for i in range(count)]


def vector(entry: Entry) -> np.ndarray:
    """Values of any tensor, float32 in its shape: norms, biases, sinks."""
    stored = entry.stored()
    if isinstance(stored, Stored) and isinstance(stored.codec, Float) and 0 not in entry.shape:
        return stored.values().reshape(entry.shape)
    return entry.load().dequantize(torch.float32).numpy()


def _stored(entry: Entry) -> Stored | None:
    """Where the entry lies, if it can be taken from there."""
    codec, shape = entry.codec, entry.shape
    if 0 in shape or (unfit(codec, shape) if blocks.natively(codec) else not isinstance(codec, Float)):
        return None
    found = entry.stored()
    return found if isinstance(found, Stored) else None


def _from_file(stored: Stored) -> Weight:
    codec, rows, columns = stored.codec, stored.rows, stored.columns
    if isinstance(codec, Float):
        assert not stored.plus, "a matrix plus one"
        return _native.Floats(stored.bytes().reshape(-1), KINDS[codec.kind], rows, columns)
    f = form(codec)
    assert f is not None
    planes = blocks.planes(codec, stored.data, rows, columns, stored.index)
    stored.forget()  # they take the place of the file's bytes
    return weight(f, rows, columns, codec.unit(columns), SCALES[blocks.FIELDS[codec.name].kind], planes)


def _from_parts(found: Apart) -> Weight | None:
    codec, (rows, columns), f = found.codec, found.shape, form(found.codec)
    planes = None if unfit(codec, found.shape) else blocks.planes_apart(found)
    if planes is None or f is None:
        return None
    scale = KINDS[codec.scale_kind] if isinstance(codec, IntK) else "f32"
    return weight(f, rows, columns, codec.unit(columns), scale, planes, fine=codec.family == "int8")


def rows_apart(q: QTensor) -> QTensor:
    """The same values in rows of their own: absmax without nesting, or, where blocks cross rows, decoded."""
    codec = q.codec
    if codec.rows_apart(q.shape):
        return q
    if isinstance(codec, Table) and q.shape[-1] % codec.block == 0:
        codes, params = q.unpack()
        return QTensor.pack(replace(codec, nested=False), q.shape, codes, {"absmax": codec._absmax(params)})
    return QTensor(F32, q.shape, {"data": q.dequantize().view(F32.matrix(q.shape))})


def _prepared(q: QTensor, expert: bool = False) -> Weight:
    """What no kernel multiplies natively (orders of columns by rows, codebooks) is decoded to float32.

    Products of experts know nothing of orders. `int8` has outliers among its activations, which suffer from rounding:
    what that takes is rounded as well.
    """
    from fewbits.runtime.cpu import Native
    from fewbits.runtime.dispatch import choose
    from fewbits.runtime.reference import _Weight

    special = q.order is not None or q.codec.family == "int8"
    without = ("decode", "native") if special and expert else ("decode",)
    prepared = choose(q, torch.device("cpu"), without=without).prepare(q, torch.float32)
    if isinstance(prepared, Native):
        m = prepared.matrices[0]
        order = None if q.order is None else q.order.numpy().astype(np.int32)
        return weight(m.form, m.rows, m.columns, m.unit, scale_name(m.dtype), m.planes, order, q.codec.family == "int8")
    assert isinstance(prepared, _Weight)
    data = prepared.weight()
    return _native.Floats(data.contiguous().view(torch.uint8), scale_name(data.dtype), *q.shape)
