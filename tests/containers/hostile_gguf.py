"""GGUF files that lie: a table of name -> (bytes, what the error says)."""

from __future__ import annotations

import struct

HUGE = 1 << 60
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64 = range(11)
NO_WORD = 2**63 - 1


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def strings(*values: str | bytes, count: int | None = None) -> bytes:
    return struct.pack("<IQ", STRING, len(values) if count is None else count) + b"".join(map(text, values))


def array(kind: int, count: int, raw: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + raw


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def record(name: str | bytes = "t", dims=(4,), kind: int = 0, offset: int = 0, count: int | None = None) -> bytes:
    count = len(dims) if count is None else count
    return text(name) + struct.pack(f"<I{len(dims)}Q", count, *dims) + struct.pack("<IQ", kind, offset)


def file(*pairs: bytes, records: tuple[bytes, ...] = (), data: int = 64, version: int = 3, magic: bytes = b"GGUF",
         tensors: int | None = None, keys: int | None = None, alignment: int = 32) -> bytes:
    """A file with these metadata pairs and tensor records, and counts that may be wrong."""
    tensors, keys = len(records) if tensors is None else tensors, len(pairs) if keys is None else keys
    raw = magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(pairs) + b"".join(records)
    return raw + b"\0" * (-len(raw) % alignment) + b"\0" * data


def alignment(kind: int, value: bytes) -> bytes:
    return file(pair("general.alignment", kind, value), records=(record(),))


def two(**second) -> bytes:
    """Two tensors of 16 float32; `second` changes the other one."""
    return file(records=(record("a", (16,)), record(**({"name": "b", "dims": (16,), "offset": 64} | second))), data=256)


HOSTILE: dict[str, tuple[bytes, str]] = {
    # the first 24 bytes
    "empty": (b"", "too short for a GGUF file"),
    "magic alone": (b"GGUF", "too short for a GGUF file"),
    "other magic": (file(magic=b"GGML"), "not a GGUF file"),
    "version 0": (file(version=0), "GGUF version 0"),
    "version 1": (file(version=1), "GGUF version 1"),
    "version 4": (file(version=4), "GGUF version 4"),
    "big-endian": (file(version=3 << 24), "big-endian"),
    "tensor count past the file": (file(tensors=1 << 50), "tensor count is"),
    "tensor count 2^63": (file(tensors=1 << 63), "tensor count is"),
    "tensor count 2^64 - 1": (file(tensors=2**64 - 1), "tensor count is"),
    "metadata count past the file": (file(keys=1 << 50), "metadata count is"),
    "metadata count 2^63": (file(keys=1 << 63), "metadata count is"),
    # keys
    "key longer than the file": (file(struct.pack("<Q", HUGE), keys=1), "length of a metadata key"),
    "key of 2^63 bytes": (file(struct.pack("<Q", 1 << 63), keys=1), "length of a metadata key"),
    "key not UTF-8": (file(pair(b"\xff\xfe", U8, b"\1")), "a metadata key is not valid UTF-8 at its byte 0"),
    "key empty": (file(pair("", U8, b"\1")), "a metadata key is '', which is no name"),
    "key with NUL": (file(pair("a\0b", U8, b"\1")), "which is no name"),
    "key twice": (file(pair("k", U8, b"\1"), pair("k", U8, b"\1")), "'k' appears twice"),
    # values
    "value type unknown": (file(pair("k", 99, b"")), "k has the unknown value type 99"),
    "value type 2^32 - 1": (file(pair("k", 2**32 - 1, b"")), "k has the unknown value type"),
    "string past the file": (file(pair("k", STRING, struct.pack("<Q", HUGE))), "length of k is"),
    "string of 2^64 - 1": (file(pair("k", STRING, struct.pack("<Q", 2**64 - 1))), "length of k is"),
    "string not UTF-8": (file(pair("k", STRING, text(b"ab\xc3"))), "k is not valid UTF-8 at its byte 2"),
    "string of surrogates": (file(pair("k", STRING, text(b"\xed\xa0\x80"))), "k is not valid UTF-8"),
    "bool 2": (file(pair("k", BOOL, b"\2")), "k is a boolean of value 2"),
    "array past the file": (file(pair("k", ARRAY, array(U32, HUGE))), "length of k is"),
    "array that wraps": (file(pair("k", ARRAY, array(U64, 1 << 61))), "length of k is"),
    "strings past the file": (file(pair("k", ARRAY, strings(count=HUGE))), "length of k is"),
    "second string past the file": (file(pair("k", ARRAY, array(STRING, 2, text("a") + struct.pack("<Q", HUGE)))),
                                    r"k\[1\] is longer than the file"),
    "third string past the file": (file(pair("k", ARRAY, array(STRING, 9, text("a" * 300) + text("") + u32(900)))),
                                   r"k\[2\] is longer than the file"),
    "fewer strings than said": (file(pair("k", ARRAY, strings("a", "b", count=9)), data=0, alignment=1),
                                "length of k is 9|longer than the file"),
    "string of strings not UTF-8": (file(pair("k", ARRAY, strings("é", b"x\xff", "y"))),
                                    r"k\[1\] is not valid UTF-8 at its byte 1"),
    "character across two strings": (file(pair("k", ARRAY, strings(b"\xc3", b"\xa9"))), r"k\[0\] is not valid UTF-8"),
    "long string not UTF-8": (file(pair("k", ARRAY, strings("a" * 130, "b" * 200 + "é", b"c" * 180 + b"\xe2\x82"))),
                              r"k\[2\] is not valid UTF-8 at its byte 180"),
    "array of arrays": (file(pair("k", ARRAY, array(ARRAY, 1, array(U8, 1, b"\1")))), "k: arrays of arrays are not"),
    "arrays 10 000 deep": (file(pair("k", ARRAY, array(ARRAY, 1) * 10_000)), "k: arrays of arrays are not"),
    "array of unknown items": (file(pair("k", ARRAY, array(50, 1))), "item type 50"),
    "array of bool 3": (file(pair("k", ARRAY, array(BOOL, 3, b"\0\1\3"))), "boolean that is neither"),
    # alignment
    "alignment 0": (alignment(U32, u32(0)), "general.alignment is 0"),
    "alignment 24": (alignment(U32, u32(24)), "general.alignment is 24"),
    "alignment 2^31": (alignment(U32, u32(1 << 31)), "general.alignment is 2147483648"),
    "alignment a string": (alignment(STRING, text("32")), "general.alignment is '32' .STRING."),
    "alignment 64 bits wide": (alignment(U64, struct.pack("<Q", 32)), "general.alignment is 32 .UINT64."),
    "alignment an array": (alignment(ARRAY, array(U32, 1, u32(32))), "general.alignment is"),
    # tensors: names and shapes
    "name not UTF-8": (file(records=(record(b"\xff"),)), "a tensor's name is not valid UTF-8"),
    "name empty": (file(records=(record(""),)), "a tensor's name is '', which is no name"),
    "name with NUL": (file(records=(record("a\0b"),)), "which is no name"),
    "name with ..": (file(records=(record("../../etc/passwd"),)), "'../../etc/passwd', which is no name"),
    "name twice": (two(name="a"), "'a' appears twice"),
    "name of 2^63 bytes": (file(records=(struct.pack("<Q", 1 << 63),)), "length of a tensor's name"),
    "no dimensions": (file(records=(record(dims=()),)), "'t' has 0 dimensions"),
    "5 dimensions": (file(records=(record(dims=(1, 1, 1, 1, 1)),)), "'t' has 5 dimensions"),
    "2^32 - 1 dimensions": (file(records=(record(count=2**32 - 1),)), "'t' has 4294967295 dimensions"),
    "dimension 0": (file(records=(record(dims=(4, 0)),)), r"impossible shape \[0, 4\]"),
    "dimension -1": (file(records=(record(dims=(2**64 - 1,)),)), "impossible shape"),
    "dimension 2^62": (file(records=(record(dims=(1 << 62,)),)), "'t' ends at byte"),
    "dimensions whose product wraps to 0": (file(records=(record(dims=(1 << 32, 1 << 32)),)), "impossible shape"),
    "dimensions whose product wraps to 4": (file(records=(record(dims=((1 << 62) + 1, 4)),)), "impossible shape"),
    "bytes that wrap when padded": (file(records=(record(dims=(1 << 62,)), record("u", offset=0))), "ends at byte"),
    "type unknown": (file(records=(record(kind=77),)), "'t' has the unknown type 77"),
    "type 2^32 - 1": (file(records=(record(kind=2**32 - 1),)), "'t' has the unknown type"),
    **{f"type {kind}, removed": (file(records=(record(dims=(256,), kind=kind),), data=4096),
                                 f"'t' has the type {kind}, {name}, which ggml no longer has")
       for kind, name in ((4, "Q4_2"), (5, "Q4_3"), (31, "Q4_0_4_4"), (32, "Q4_0_4_8"), (33, "Q4_0_8_8"),
                          (36, "IQ4_NL_4_4"), (37, "IQ4_NL_4_8"), (38, "IQ4_NL_8_8"))},
    "width 33 in Q8_0": (file(records=(record(dims=(33,), kind=8),)), "rows of 33 do not divide into blocks of 32"),
    "width 128 in Q4_K": (file(records=(record(dims=(128, 2), kind=12),), data=512), "rows of 128 do not divide"),
    # tensors: places
    "offset unaligned": (two(offset=68), "'b' starts at 68, which is no multiple of the alignment"),
    "offset 2^63": (two(offset=1 << 63), "'b' ends at byte"),
    "offset that wraps": (two(offset=2**64 - 32), "'b' ends at byte"),
    "tensors on each other": (two(offset=32), "'b' starts at 32 and overlaps what is before it: 64 is expected"),
    "tensors in one place": (two(offset=0), "'b' starts at 0 and overlaps what is before it: 64 is expected"),
    "gap": (two(offset=96), "'b' starts at 96 and leaves a gap before it: 64 is expected"),
    "first tensor not at the start": (file(records=(record(offset=32),)), "leaves a gap before it: 0 is expected"),
    "tensor past the end": (file(records=(record(dims=(17,)),)), "'t' ends at byte"),
    "no data": (file(records=(record(),), data=0, alignment=1), "'t' ends at byte"),
    # many
    "a million tiny tensors": (file(records=tuple(record(f"t{i}", (1,), offset=32 * i) for i in range(1000)) * 1000,
                                    data=0), "tensor count is 1000000; at most 65536"),
    "a million metadata pairs": (file(*[pair(f"{i:07}", U8, b"\0") for i in range(1000)] * 1000),
                                 "metadata count is 1000000; at most 65536"),
}
