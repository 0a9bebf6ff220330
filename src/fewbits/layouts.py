"""How the bytes of each number format lie, as data, and the formula that decodes them. For `explain`; tested against
what the codecs pack.

A formula is an expression over the codec's parameters, `code`, and `levels`, the format's table of levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewbits.codecs.base import ITEM_BYTES, Codec
from fewbits.codecs.float8 import Float8Tiles
from fewbits.codecs.table import NESTED_BLOCK, Table


@dataclass(frozen=True)
class Field:
    """A run of bytes of a block, or a plane of its own."""

    name: str
    nbytes: int
    text: str
    sets: tuple[str, ...]  # which parameters it holds, and "codes"


@dataclass(frozen=True)
class Layout:
    """`unit` weights, in words and by shape; fields follow one another in the bytes where they are `adjoining`."""

    unit: str
    shape: tuple[int, ...]
    fields: tuple[Field, ...]
    adjoining: bool
    formula: str

    @property
    def nbytes(self) -> int:
        return sum(f.nbytes for f in self.fields)


D = ("d", 2, "scale, float16", ("d",))
DMIN = ("dmin", 2, "scale of the minimums, float16", ("dmin",))
M = ("m", 2, "minimum, float16", ("m",))
HALVES = ("qs", 16, "4 bits a code: column i in the low, i + 16 in the high half of byte i", ("codes",))
FIFTH = ("qh", 4, "the fifth bits: bit i is column i's", ("codes",))
SIXES = ("scales", 12, "8 scales and 8 minimums of 6 bits, one of each for 32 columns", ("scales", "mins"))
RUNS = "4 bits a code: in every 64 columns, i in the low, i + 32 in the high half of byte i"
PAIRS = "2 bits a code: in every 128 columns, byte j holds j, j + 32, j + 64, j + 96, lowest bits first"

# ggml's blocks: formula, fields in the order of the bytes
BLOCKS: dict[str, tuple[str, tuple[tuple[str, int, str, tuple[str, ...]], ...]]] = {
    "Q4_0": ("d * (code - 8)", (D, HALVES)),
    "Q4_1": ("d * code + m", (D, M, HALVES)),
    "Q5_0": ("d * (code - 16)", (D, FIFTH, HALVES)),
    "Q5_1": ("d * code + m", (D, M, FIFTH, HALVES)),
    "Q8_0": ("d * (code - 128)", (D, ("qs", 32, "a signed byte a column: code - 128", ("codes",)))),
    "Q2_K": ("d * scales * code - dmin * mins", (
        ("scales", 16, "16 columns a byte: scale in the low, minimum in the high half", ("scales", "mins")),
        ("qs", 64, PAIRS, ("codes",)), D, DMIN)),
    "Q3_K": ("d * scales * (code - 4)", (
        ("hmask", 32, "the third bits: bit b of byte j is column j + 32 b's", ("codes",)),
        ("qs", 64, "the low " + PAIRS, ("codes",)),
        ("scales", 12, "16 scales of 6 bits plus 32: 8 bytes of low halves, 4 bytes of high bits", ("scales",)), D)),
    "Q4_K": ("d * scales * code - dmin * mins", (D, DMIN, SIXES, ("qs", 128, RUNS, ("codes",)))),
    "Q5_K": ("d * scales * code - dmin * mins", (
        D, DMIN, SIXES, ("qh", 32, "the fifth bits: bit b of byte j is column j + 32 b's", ("codes",)),
        ("qs", 128, RUNS, ("codes",)))),
    "Q6_K": ("d * scales * (code - 32)", (
        ("ql", 128, "low 4 bits: in every 128 columns, i in the low, i + 64 in the high half of byte i", ("codes",)),
        ("qh", 64, "high " + PAIRS, ("codes",)),
        ("scales", 16, "a signed byte for 16 columns", ("scales",)), D)),
    "IQ4_NL": ("d * levels[code]", (D, HALVES)),
    "IQ4_XS": ("d * scales * levels[code]", (
        D, ("scales_h", 2, "the high 2 bits of 8 scales, one for 32 columns, plus 32", ("scales",)),
        ("scales_l", 4, "their low 4 bits", ("scales",)),
        ("qs", 128, "4 bits a code: in every 32 columns, i in the low, i + 16 in the high half", ("codes",)))),
    "MXFP4": ("2.0 ** (exponent - 128) * levels[code]", (
        ("e", 1, "scale, a power of two: its exponent plus 127; levels are doubled here", ("exponent",)), HALVES)),
    "TQ1_0": ("d * (code - 1)", (
        ("qs", 48, "five digits of base 3 a byte", ("codes",)), ("qh", 4, "four digits a byte", ("codes",)), D)),
    "TQ2_0": ("d * (code - 1)", (("qs", 64, PAIRS, ("codes",)), D)),
    "Q1_0": ("d * (2 * code - 1)", (D, ("qs", 16, "bit i is column i's", ("codes",)))),
}

# other formats: by family, the formula and what each plane is: text, and what it sets
PLANES: dict[str, tuple[str, dict[str, tuple[str, tuple[str, ...]]]]] = {
    "float": ("code", {"data": ("the number itself", ("codes",))}),
    "int": ("scale * (code - zero)", {
        "codes": ("a stream of codes, column after column from bit 0 up", ("codes",)),
        "scales": ("scale of the group", ("scale",)), "zeros": ("zero point, as wide as a code", ("zero",))}),
    "int8": ("absmax / 127 * (code - 128)", {
        "codes": ("a signed byte a column: code - 128", ("codes",)),
        "absmax": ("largest magnitude of the row, float32", ("absmax",))}),
    "w8a8": ("scale * (code - zero)", {
        "codes": ("a signed byte a column: code - 128", ("codes",)),
        "scales": ("scale of the row", ("scale",)), "zeros": ("zero point of the row: a signed byte", ("zero",)),
        "inputs": ("scale of the layer's activations, float32, in every row", ("inputs",))}),
    "table": ("absmax * levels[code]", {
        "codes": ("4 bits a code: the first column in the high half", ("codes",)),
        "absmax": ("largest magnitude of the block", ("absmax",))}),
    **{family: ("scale * float8(code)", {
        "codes": ("the bits of an 8-bit float a column", ("codes",)), "scales": ("scale of the row", ("scale",))})
       for family in ("fp8", "fp8-e5m2")},
    "fp8-tiles": ("scale * float8(code)", {
        "codes": ("the bits of an 8-bit float a column", ("codes",)), "scales": ("scale of the tile", ("scale",))}),
    "codebook": ("levels[code]", {
        "codes": ("a stream of codes, column after column from bit 0 up", ("codes",)),
        "levels": ("the levels of the row, float16", ("levels",))}),
}
NESTED = ("(map8[absmax_code] * nested_absmax + offset) * levels[code]", {
    "codes": ("4 bits a code: the first column in the high half", ("codes",)),
    "absmax": ("8 bits a block: an entry of a fixed table of 256", ("absmax_code",)),
    "offset": ("mean of all absmax of the tensor, float32", ("offset",)),
    "nested_absmax": (f"scale of {NESTED_BLOCK} blocks' absmax, float32", ("nested_absmax",))})
ROW = 4096  # columns of the row that is drawn where a row is the unit


def layout(codec: Codec) -> Layout | None:
    """The bytes of one unit, or None for types that the gguf package decodes."""
    if codec.name in BLOCKS:
        formula, rows = BLOCKS[codec.name]
        columns = codec.unit(ROW)
        return Layout(f"a block of {columns} weights", (1, columns), tuple(Field(*row) for row in rows), True, formula)
    if codec.family not in PLANES:
        return None
    formula, texts = NESTED if isinstance(codec, Table) and codec.nested else PLANES[codec.family]
    unit, shape = _unit(codec)
    fields = tuple(Field(name, math.prod(size) * ITEM_BYTES[dtype], *texts[name])
                   for name, (dtype, size) in codec.planes(shape).items())
    return Layout(unit, shape, fields, False, formula)


def _unit(codec: Codec) -> tuple[str, tuple[int, ...]]:
    if codec.family == "float":
        return "one weight", (1, 1)
    if isinstance(codec, Float8Tiles):
        tile = codec.unit(1 << 30)
        return f"a tile of {tile} x {tile} weights", (tile, tile)
    if isinstance(codec, Table) and codec.nested:
        return f"{NESTED_BLOCK} blocks of {codec.block} weights", (NESTED_BLOCK, codec.block)
    columns = codec.unit(ROW)
    kind = "block" if isinstance(codec, Table) else "group"
    return (f"a row of {ROW} weights" if columns == ROW else f"a {kind} of {columns} weights"), (1, columns)
