"""Bit streams: by hand, against Python integers, there and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.codecs.packing import (
    halves_to_stream,
    join_fields,
    pack_bits,
    packed_bytes,
    split_fields,
    stream_to_halves,
    transpose_nibbles,
    unpack_bits,
)

BITS = range(1, 9)


def test_by_hand():
    assert pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    # 3-bit codes 1, 2, 3 from the lowest bit: 011 010 001 = 0xD1
    assert pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 3).tolist() == [0xD1, 0x00]
    assert pack_bits(torch.tensor([3, 0, 1, 2, 1], dtype=torch.uint8), 2).tolist() == [0b10010011, 1]
    assert pack_bits(torch.tensor([1, 0, 0, 1], dtype=torch.uint8), 1).tolist() == [0b1001]


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=70), st.integers(1, 3))
def test_codes_there_and_back(bits, codes, rows):
    codes = torch.tensor(codes, dtype=torch.uint8).bitwise_and((1 << bits) - 1).repeat(rows, 1)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, packed_bytes(codes.shape[1], bits))
    assert torch.equal(unpack_bits(packed, bits, codes.shape[1]), codes)
    number = sum(int(c) << (bits * i) for i, c in enumerate(codes[0]))
    assert bytes(packed[0].tolist()) == number.to_bytes(packed.shape[1], "little")


@given(st.integers(1, 8), st.integers(1, 9), st.randoms(use_true_random=False))
def test_bytes_there_and_back(bits, groups, random):
    """Whole groups of eight codes use every bit."""
    stream = torch.tensor([[random.randrange(256) for _ in range(groups * bits)]], dtype=torch.uint8)
    assert torch.equal(pack_bits(unpack_bits(stream, bits, groups * 8), bits), stream)


@pytest.mark.parametrize("bits", BITS)
def test_input_is_untouched(bits):
    codes = torch.arange(16, dtype=torch.uint8).bitwise_and((1 << bits) - 1)
    before = codes.clone()
    pack_bits(codes, bits)
    assert torch.equal(codes, before)


def test_fields_there_and_back():
    scale = torch.tensor([[1.0], [-2.5]], dtype=torch.float16)
    rest = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)
    block = join_fields(scale, rest)
    assert block.tolist() == [[0x00, 0x3C, 1, 2, 3], [0x00, 0xC1, 4, 5, 6]]
    back = split_fields(block, (2, torch.float16), (3, torch.uint8))
    assert torch.equal(back[0], scale)
    assert torch.equal(back[1], rest)


def test_nibbles_change_order_without_being_taken_apart() -> None:
    codes = torch.arange(5 * 3 * 32).mul(7).bitwise_and(15).to(torch.uint8).view(5, 3, 32)
    stream = pack_bits(codes, 4)
    halves = codes[..., :16] | (codes[..., 16:] << 4)
    assert torch.equal(stream_to_halves(stream), halves)
    assert torch.equal(halves_to_stream(halves), stream)


def test_nibbles_are_transposed() -> None:
    codes = torch.randint(0, 16, (24, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    words = pack_bits(codes, 4).view(torch.int32)
    meant = pack_bits(codes.t().contiguous(), 4).view(torch.int32)
    assert torch.equal(transpose_nibbles(words), meant)
    assert torch.equal(transpose_nibbles(meant), words)
