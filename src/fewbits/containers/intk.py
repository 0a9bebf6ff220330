"""What the layouts of int-k weights share: codes in 32-bit words, scales, zero points, and the codec they amount to."""

from __future__ import annotations

from fewbits import codecs
from fewbits.codecs.affine import IntK
from fewbits.codecs.packing import unpack_bits
from fewbits.containers.base import flat_bytes
from fewbits.containers.safetensors import Raw
from fewbits.lazy import torch
from fewbits.qtensor import QTensor

BITS = (2, 3, 4, 8)
SCALES = {"F16": "", "BF16": "-sbf16", "F32": "-sf32"}  # type of the scales -> what the codec's name says of it


def words(count: int, bits: int) -> int:
    """32-bit words of a stream of `count` codes; the last one may be filled in part."""
    return -(-count * bits // 32)


def to_words(stream: torch.Tensor, count: int) -> torch.Tensor:
    """Bytes `[rows, n]` to int32 `[rows, count]`, padded with zeros."""
    padded = torch.nn.functional.pad(stream, (0, 4 * count - stream.shape[1]))
    return padded.contiguous().view(-1).view(torch.int32).view(len(stream), count)


def to_bytes(found: torch.Tensor) -> torch.Tensor:
    """int32 `[rows, count]` to bytes `[rows, 4 * count]`."""
    return flat_bytes(found).view(len(found), -1)


def codec_of(bits: int, group: int, symmetric: bool, scales: Raw) -> IntK:
    """The codec of a layer; `group` is -1 where a row has one scale."""
    name = f"int{bits}-" + ("row" if group == -1 else f"g{group}") + ("" if symmetric else "-asym")
    codec = codecs.get(name + SCALES[scales.dtype])
    assert isinstance(codec, IntK)
    return codec


def group_reason(codec: IntK, columns: int) -> str | None:
    """Why groups of the codec would be ragged in a row of `columns`, or None."""
    if codec.group == -1 or columns % codec.group == 0:
        return None
    return f"groups of {codec.group} do not divide {columns} columns"


def expect(raw: Raw, dtypes: tuple[str, ...], sides: int) -> None:
    """
    Raises:
        FewbitsError: another type, another number of dimensions, or a dimension of 0.
    """
    if raw.dtype not in dtypes or len(raw.shape) != sides or 0 in raw.shape:
        raise raw.refuse(f"{raw.dtype} {list(raw.shape)}, where {' or '.join(dtypes)} with {sides} dimensions was "
                         "expected")


def expect_shape(raw: Raw, meant: tuple[int, ...], bits: int, group: int) -> None:
    """
    Raises:
        FewbitsError: another shape than codes of `bits` bits in groups of `group` columns have.
    """
    if raw.shape != meant:
        raise raw.refuse(f"{list(raw.shape)}, where {list(meant)} was expected of {bits} bits in groups of {group}",
                         "quantization_config does not belong to this file, or names this layer wrongly")


def order_of(g_idx: Raw | None, columns: int, unit: int, groups: int) -> torch.Tensor | None:
    """The column order of full act-order: columns sorted by group, or None where they lie so already.

    Raises:
        FewbitsError: a group that is none, or groups of unequal size.
    """
    if g_idx is None:
        return None
    found = g_idx.tensor().long()
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < groups:
        raise g_idx.refuse(f"groups {int(found.min())} to {int(found.max())}, where there are {groups}")
    meant = torch.arange(columns) // unit
    if torch.equal(found, meant):
        return None
    in_order, order = torch.sort(found, stable=True)
    if not torch.equal(in_order, meant):
        at = int((in_order != meant).nonzero()[0])
        raise g_idx.refuse(f"group {int(meant[at])} has {int((found == meant[at]).sum())} columns, where group_size "
                           f"is {unit}")
    return order


def all_alike(qzeros: Raw, bits: int, count: int, stored: int) -> bool:
    """Whether each of the `count` codes of every row of words is `stored`; looks at bytes, without torch."""
    eight = sum(stored << (i * bits) for i in range(8)).to_bytes(bits, "little")
    used = (1 << (count * bits)) - 1  # what lies behind is padding
    meant = int.from_bytes(eight * (count // 8 + 1), "little") & used
    size, data = 4 * qzeros.shape[1], qzeros.data()
    return all(int.from_bytes(data[i:i + size], "little") & used == meant for i in range(0, len(data), size))


def zeros_of(tensor: QTensor) -> torch.Tensor:
    """Zero points `[rows, groups]` of a tensor, the middle of the grid where the codec stores none."""
    codec, (rows, groups) = tensor.codec, tensor.planes["scales"].shape
    assert isinstance(codec, IntK)
    if codec.symmetric:
        return torch.full((rows, groups), codec.middle, dtype=torch.uint8)
    return unpack_bits(tensor.planes["zeros"], codec.bits, groups)
