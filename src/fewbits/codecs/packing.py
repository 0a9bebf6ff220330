"""Codes of a few bits side by side in bytes. Pure functions on the last dimension; leading dimensions are kept."""

from __future__ import annotations

from fewbits.lazy import torch

NIBBLES = 0x0F0F0F0F0F0F0F0F  # the low one of each byte


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a little-endian stream of `count` codes."""
    return -(-count * bits // 8)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes `[..., n]` to a little-endian bit stream `[..., ceil(n * bits / 8)]`: code 0 in the lowest bits."""
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    count = codes.shape[-1]
    octets = _padded(codes, 8).unflatten(-1, (-1, 8))  # 8 codes of k bits fill k bytes
    if bits in (1, 2, 4):
        parts = octets.reshape(*codes.shape[:-1], -1, 8 // bits)
        packed = parts[..., 0].clone()
        for i in range(1, 8 // bits):
            packed |= parts[..., i] << (i * bits)
        return packed[..., :packed_bytes(count, bits)].contiguous()
    word = octets[..., 0].long()
    for i in range(1, 8):
        word |= octets[..., i].long() << (i * bits)
    packed = torch.stack([(word >> (8 * i)) & 255 for i in range(bits)], -1).to(torch.uint8)
    return packed.flatten(-2)[..., :packed_bytes(count, bits)].contiguous()


def unpack_bits(stream: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes of a stream made by `pack_bits`."""
    if bits == 8:
        return stream[..., :count]
    mask = (1 << bits) - 1
    if bits in (1, 2, 4):
        codes = torch.stack([(stream >> shift) & mask for shift in range(0, 8, bits)], -1)
        return codes.flatten(-2)[..., :count].contiguous()
    octets = _padded(stream, bits).unflatten(-1, (-1, bits))
    word = octets[..., 0].long()
    for i in range(1, bits):
        word |= octets[..., i].long() << (8 * i)
    codes = torch.stack([(word >> (bits * i)) & mask for i in range(8)], -1).to(torch.uint8)
    return codes.flatten(-2)[..., :count].contiguous()


def stream_to_halves(stream: torch.Tensor) -> torch.Tensor:
    """32 4-bit codes side by side `[..., 16 bytes]` to ggml's order: byte i holds columns i and i + 16."""
    first, last = stream.contiguous().view(torch.int64).unbind(-1)  # columns 0 … 15, 16 … 31
    even = ((first & NIBBLES) | ((last & NIBBLES) << 4)).unsqueeze(-1).view(torch.uint8)
    odd = (((first >> 4) & NIBBLES) | (last & ~NIBBLES)).unsqueeze(-1).view(torch.uint8)
    return (even.short() | (odd.short() << 8)).view(torch.uint8)


def halves_to_stream(halves: torch.Tensor) -> torch.Tensor:
    """The inverse of `stream_to_halves`."""
    pairs = halves.contiguous().view(torch.int16)
    even, odd = (x.to(torch.uint8).view(torch.int64)[..., 0] for x in (pairs, pairs >> 8))
    first = (even & NIBBLES) | ((odd & NIBBLES) << 4)
    last = ((even >> 4) & NIBBLES) | (odd & ~NIBBLES)
    return torch.stack([first, last], -1).view(torch.uint8)


def transpose_nibbles(words: torch.Tensor) -> torch.Tensor:
    """A matrix of 4-bit codes, 8 columns an int32 `[rows, columns / 8]`, transposed: `[columns, rows / 8]`.

    Eight rows by eight columns at a time: halves, quarters, then single codes change places between rows.
    """
    x = words.view(-1, 8, words.shape[1])
    for far, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        a, b = x.view(len(x), 4 // far, 2, far, -1).unbind(2)
        x = torch.stack([(a & mask) | ((b & mask) << 4 * far), ((a >> 4 * far) & mask) | (b & ~mask)], 2)
    return x.view(len(x), 8, -1).permute(2, 1, 0).reshape(-1, len(x))


def _padded(x: torch.Tensor, multiple: int) -> torch.Tensor:
    rest = -x.shape[-1] % multiple
    return torch.nn.functional.pad(x, (0, rest)) if rest else x


def join_fields(*fields: torch.Tensor) -> torch.Tensor:
    """Fields of any dtype `[..., k]`, side by side as bytes `[..., total]`."""
    return torch.cat([f.contiguous().view(torch.uint8) for f in fields], -1)


def split_fields(block: torch.Tensor, *fields: tuple[int, torch.dtype]) -> list[torch.Tensor]:
    """Bytes `[..., total]` to fields of (bytes, dtype): the inverse of `join_fields`."""
    parts = block.split([size for size, _ in fields], -1)
    return [part.contiguous().view(dtype) for part, (_, dtype) in zip(parts, fields, strict=True)]
