"""NF4 and FP4: by hand, blocks over rows, nested absmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits import codecs
from fewbits.codecs.table import TABLES, dynamic_map, table
from fewbits.qtensor import QTensor


def test_nf4_by_hand():
    """The first element is in the high nibble."""
    codec = codecs.get("nf4-b4")
    planes = {"codes": torch.tensor([[0x0F, 0x7E]], dtype=torch.uint8), "absmax": torch.tensor([[2.0]])}
    assert QTensor(codec, (1, 4), planes).dequantize().tolist() == [[-2.0, 2.0, 0.0, 2 * 0.7229568362236023]]


def test_fp4_by_hand():
    codec = codecs.get("fp4-b4")
    planes = {"codes": torch.tensor([[0x3B, 0x19]], dtype=torch.uint8), "absmax": torch.tensor([[12.0]])}
    got = QTensor(codec, (1, 4), planes).dequantize()
    assert got[0, :2].tolist() == [12.0, -12.0]
    assert torch.allclose(got[0, 2:], torch.tensor([0.0625, -0.0625]))


def test_blocks_run_over_rows():
    """Rows of 3 in blocks of 4: element 3 starts row 1 and still belongs to block 0; the odd end is padded."""
    codec = codecs.get("nf4-b4")
    assert codec.matrix((3, 3)) == (1, 9)
    assert not codec.rows_apart((3, 3))
    planes = {"codes": torch.tensor([0xFF, 0xFF, 0x00, 0x00, 0xF7], dtype=torch.uint8),
              "absmax": torch.tensor([1.0, 2.0, 3.0])}
    assert codec.planes((3, 3)) == {"codes": ("uint8", (5,)), "absmax": ("float32", (3,))}
    got = QTensor(codec, (3, 3), planes)
    assert got.dequantize().tolist() == [[1, 1, 1], [1, -2, -2], [-2, -2, 3]]
    again = codec.pack(*got.unpack(), (3, 3))
    assert all(torch.equal(again[k], planes[k]) for k in planes)


def test_nested_by_hand():
    """absmax = map[code] * nested_absmax + offset; code 255 is 1 and the middle one 0."""
    codec = codecs.get("nf4-b2-dq")
    middle = dynamic_map().table.tolist().index(0.0)
    planes = {"codes": torch.tensor([0xFF, 0xF0], dtype=torch.uint8),
              "absmax": torch.tensor([255, middle], dtype=torch.uint8),
              "nested_absmax": torch.tensor([0.5]), "offset": torch.tensor([2.0])}
    assert QTensor(codec, (2, 2), planes).dequantize().tolist() == [[2.5, 2.5], [2.0, -2.0]]


def test_the_dynamic_map():
    """127 levels of each sign but for the 1, ascending; decade i of each sign has 2^i."""
    levels = dynamic_map().table
    assert len(levels) == len(set(levels.tolist())) == 256
    assert torch.equal(levels, levels.sort().values)
    assert levels[-1] == 1.0
    assert ((levels > 0.1) & (levels < 1)).sum() == 64
    assert (levels < -0.1).sum() == 64
    assert torch.isclose(levels[-2], torch.tensor(0.99296874))


@pytest.mark.parametrize("kind", TABLES)
def test_tables_are_ordered_by_rank(kind):
    t = table(kind)
    assert torch.equal(t.table[t.order], t.table.sort().values)
    assert t.table.abs().max() == 1


@given(st.sampled_from(["nf4", "fp4", "nf4-dq", "fp4-b32-dq", "nf4-b48"]), st.integers(1, 5), st.integers(1, 200))
def test_any_shape_there_and_back(name, rows, columns):
    codec = codecs.get(name)
    generator = torch.Generator().manual_seed(rows * columns)
    planes = {k: (torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) if dtype == "uint8"
                  else torch.rand(shape, generator=generator))
              for k, (dtype, shape) in codec.planes((rows, columns)).items()}
    if rows * columns % 2:
        planes["codes"].view(-1)[-1] = planes["codes"].view(-1)[-1] & 0xF0 | TABLES[codec.kind].index(0.0)
    back = codec.pack(*codec.unpack(planes, (rows, columns)), (rows, columns))
    assert all(torch.equal(back[k], planes[k]) for k in planes)


def test_nested_state_covers_every_256_blocks():
    w = torch.randn(40, 512, generator=torch.Generator().manual_seed(0))
    w[30:] *= 10
    state = codecs.get("nf4-dq").begin(w, None)
    absmax = w.reshape(-1, 64).abs().amax(1)
    assert torch.equal(state["offset"].unique(), absmax.mean().reshape(1))
    first = state["nested_absmax"].reshape(-1)[:256]
    assert torch.equal(first.unique(), (absmax[:256] - absmax.mean()).abs().max().reshape(1))
    assert len(state["nested_absmax"].unique()) == 2
