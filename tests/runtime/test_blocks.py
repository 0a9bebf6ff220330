"""Blocks of ggml's types as native planes, bit for bit: against codecs that unpack them."""

from __future__ import annotations

from weakref import ref

import numpy as np
import pytest
import torch

from fewbits import _native, codecs
from fewbits.codecs import ggml, iq4, kquants, mxfp4, ternary
from fewbits.codecs.ggml import Blocks
from fewbits.qtensor import QTensor
from fewbits.runtime import blocks
from fewbits.runtime.cpu import Native, _Planes
from fewbits.runtime.interleaved import form

SHAPES = ((1, 1), (16, 2), (35, 3))  # rows, blocks of a row


def data(name: str, rows: int, count: int) -> tuple[Blocks, np.ndarray]:
    """Rows of `count` random blocks: any bytes are a block."""
    codec = codecs.get(name)
    assert isinstance(codec, Blocks)
    return codec, np.random.default_rng(rows).integers(0, 256, (rows, count * codec.block_bytes), np.uint8)


def unpacked(codec: Blocks, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Planes by way of codes and parameters."""
    shape = (len(rows), rows.shape[1] // codec.block_bytes * codec.columns)
    f = form(codec)
    assert f is not None
    planes = _Planes(f, *shape)
    planes.add(*QTensor(codec, shape, {"blocks": torch.from_numpy(rows)}).unpack())
    return planes.matrix(codec.unit(shape[1])).planes


def same(got: dict[str, np.ndarray], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() and all(np.array_equal(got[k], want[k].numpy()) for k in want)


def test_every_type_with_a_native_form_is_in_the_table() -> None:
    types = [c for family in (ggml, kquants, iq4, mxfp4, ternary) for c in family.TYPES.values()]
    assert blocks.FIELDS.keys() == {c.name for c in types if form(c) is not None}
    assert all(blocks.natively(c) is not None for c in types)
    assert blocks.natively(codecs.get("int4-g32")) is None and blocks.natively(codecs.get("F16")) is None


@pytest.mark.parametrize("name", blocks.FIELDS)
def test_planes(name: str, instructions: str) -> None:
    for rows, count in SHAPES:
        codec, raw = data(name, rows, count)
        assert same(blocks.planes(codec, [raw], rows, count * codec.columns), unpacked(codec, raw)), (rows, count)


def test_planes_begin_on_lines_and_tile_by_tile_in_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, raw = data("Q4_K", 700, 2)
    want = unpacked(codec, raw)
    for count in (1, 2, 5):
        monkeypatch.setattr("fewbits.runtime.blocks.threads", lambda count=count: count)
        got = blocks.planes(codec, [raw], 700, 512)
        assert same(got, want)
        assert {plane.ctypes.data % 64 for plane in got.values()} == {0}


def test_rows_in_another_order_and_of_several_arrays() -> None:
    codec, raw = data("Q6_K", 50, 2)
    index = np.random.default_rng(0).permutation(50)[:37]
    want = unpacked(codec, raw[index])
    assert same(blocks.planes(codec, [raw], 37, 512, index), want)
    assert same(blocks.planes(codec, [raw[:7], raw[7:8], raw[8:]], 37, 512, index), want)
    assert same(blocks.planes(codec, [raw[:20].reshape(-1), raw[20:]], 50, 512), unpacked(codec, raw))


def test_the_kernel_prepares_so() -> None:
    codec, raw = data("IQ4_XS", 3 * 20, 1)
    stack = Native(QTensor(codec, (3, 20, 256), {"blocks": torch.from_numpy(raw)}), torch.float32)
    for i, m in enumerate(stack.matrices):
        assert same({k: p.numpy() for k, p in m.planes.items()}, unpacked(codec, raw[20 * i:20 * (i + 1)]))
    assert torch.equal(stack.q.planes["blocks"], torch.from_numpy(raw))


@pytest.mark.parametrize("change, reason", [
    ({"rows": 19}, "not as many rows"), ({"rows": -1}, "out of range"), ({"columns": 500}, "no blocks of 256"),
    ({"columns": 256}, "codes have 8192 bytes"), ({"index": np.array([0, 20])}, "not as many rows"),
    ({"index": np.array([0] * 19 + [20])}, "row 20 of 20"), ({"index": np.array([0] * 19 + [-1])}, "row -1 of 20"),
    ({"data": [np.zeros(100, np.uint8)]}, "no rows of 288"), ({"threads": 0}, "0 threads"),
    ({"mins": None}, "mins are missing"), ({"codes": np.zeros(8, np.uint8)}, "codes have 8 bytes")])
def test_what_does_not_fit_is_an_error_before_any_work(change: dict[str, object], reason: str) -> None:
    codec, raw = data("Q4_K", 20, 2)
    found = blocks.planes(codec, [raw], 20, 512)
    before = {k: plane.copy() for k, plane in found.items()}
    right = {"blocks": blocks.natively(codec), "data": [raw * 0], "index": None, "rows": 20, "columns": 512,
             "threads": 1, **found}
    with pytest.raises(ValueError, match=reason):
        _native.prepare(**(right | change))  # type: ignore[arg-type]
    assert all(np.array_equal(found[k], plane) for k, plane in before.items())


@pytest.mark.parametrize("change", [
    {"bytes": 143}, {"bytes": 3}, {"columns": 512}, {"columns": 100}, {"bits": 7}, {"scale_bytes": 3},
    {"scale_at": 143}, {"min_at": 143}, {"codes": []}, {"codes": [(0, 128, 16, 4, 32, 2, 0, 0, False, False)]},
    {"codes": [(0, 256, 16, 4, 3, 2, 0, 0, False, False)]}, {"codes": [(0, 256, 16, 4, 32, 3, 0, 0, False, False)]},
    {"codes_minus": 256}, {"submins": [(0, 20, 4, 6, 4, 1, 0, 0, False, False)]}])
def test_descriptions_that_leave_the_block_are_errors(change: dict[str, object]) -> None:
    right = {"bytes": 144, "columns": 256, "bits": 4, "scale_bytes": 2, "scale_at": 0, "min_at": 2,
             "codes": [(0, 256, 16, 4, 32, 2, 0, 0, False, False)], "codes_minus": 0, "subscales": [],
             "subscales_minus": 0, "submins": []}
    _native.Blocks(**right)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        _native.Blocks(**(right | change))  # type: ignore[arg-type]


def test_memory_is_shared_in_large_pages_and_freed_with_the_last() -> None:
    arena = blocks._Arena()
    one, two = arena.take(640), arena.take(128)
    one[:], two[:] = 1, 2
    assert (one == 1).all() and one.ctypes.data % blocks.PAGE == 0 and two.ctypes.data == one.ctypes.data + 640
    whole = ref(two.base)
    large = arena.take(blocks.ARENA + blocks.PAGE)  # does not fit behind them
    assert len(large) == blocks.ARENA + blocks.PAGE and large.ctypes.data % blocks.PAGE == 0
    del one
    assert whole() is not None
    del two
    assert whole() is None
    del large
    assert len(arena.take(64)) == 64


def test_rows_that_lie_in_each_other_stay_in_their_array() -> None:
    """Words of 40 rows side by side, 8 columns each: 64 columns."""
    words = np.random.default_rng(0).integers(0, 256, 8 * 40 * 4, np.uint8)
    described = {"bytes": 4 * 4 * 40, "columns": 32, "bits": 4, "scale_bytes": 0, "scale_at": 0, "min_at": -1,
                 "codes": [(8 * w, 8, 160 * w, 4, 1, 2, 0, 0, False, False) for w in range(4)], "codes_minus": 0,
                 "subscales": [], "subscales_minus": 0, "submins": []}
    made = _native.Blocks(**described)  # type: ignore[arg-type]
    codes, none = np.empty(3 * 16 * 64 // 2, np.uint8), (None, None, None, None)
    _native.prepare(made, [words], None, 40, 64, codes, *none, 1, stride=4)
    out = np.empty((40, 64), np.uint8)
    _native.deinterleave(codes, 4, out)
    numbers = words.view("<u4").reshape(8, 40)
    assert np.array_equal(out, np.moveaxis(numbers[..., None] >> np.arange(0, 32, 4) & 15, 0, 1).reshape(40, 64))
    for data, stride, rows in (([words[:-1]], 4, 40), ([words], 5, 40), ([words], 0, 40), ([words], -4, 40),
                               ([words, words], 4, 40), ([], 4, 40)):
        with pytest.raises(ValueError, match="rows lie beyond|one array"):
            _native.prepare(made, data, None, rows, 64, codes, *none, 1, stride=stride)
