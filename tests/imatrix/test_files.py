"""Both kinds of file against writers and readers that are not ours: gguf-py, and bytes put together here."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from fewbits import imatrix
from fewbits.errors import FewbitsError
from fewbits.imatrix import Imatrix, Sums

CHUNK = 512  # what llama-imatrix multiplies an old file by when it makes a new one of it


def drawn(matrices: int, inputs: int, counts: list[int], seed: int) -> Sums:
    sums = np.random.default_rng(seed).exponential(50, (matrices, inputs)).astype(np.float32)
    sums[np.array(counts) == 0] = 0
    return Sums(sums, np.array(counts))


def example() -> Imatrix:
    """A dense tensor, a stack of three experts of which one saw nothing, and one tensor that saw nothing at all."""
    entries = {"blk.1.ffn_up_exps.weight": drawn(3, 5, [700, 0, 333], 1),
               "blk.0.attn_q.weight": drawn(1, 4, [1033], 0),
               "blk.0.ffn_down_exps.weight": drawn(2, 3, [0, 0], 2)}
    return Imatrix(entries, ["c4, 2 x 512 tokens", "äöü.txt"], 3, 512)


# what llama.cpp would make of a file: the formulas of its loader, value by value ------------------------------------
def meant_by_gguf(path: Path) -> dict[str, list[float]]:
    """The importances that llama-quantize takes from a GGUF file, by gguf-py's reader."""
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    out = {}
    for name in sorted(n.removesuffix(".counts") for n in found if n.endswith(".counts")):
        sums, counts = found[name + ".in_sum2"].data.reshape(-1), found[name + ".counts"].data.reshape(-1)
        each = len(sums) // len(counts)
        out[name] = [float(sums[i] / counts[i // each]) if counts[i // each] > 0 else 1.0 for i in range(len(sums))]
    return out


def parsed(raw: bytes) -> tuple[dict[str, tuple[int, list[float]]], int, bytes]:
    """An old file taken apart: name -> calls and values; chunks; the text."""
    at = 0

    def take(form: str) -> list:
        nonlocal at
        at += struct.calcsize(form)
        return list(struct.unpack_from(form, raw, at - struct.calcsize(form)))

    entries = {}
    for _ in range(take("<i")[0]):
        name = raw[at + 4:at + 4 + struct.unpack_from("<i", raw, at)[0]].decode()
        at += 4 + len(name)
        calls, count = take("<ii")
        entries[name] = (calls, take(f"<{count}f"))
    chunks, length = take("<ii")
    assert at + length == len(raw)
    return entries, chunks, raw[at:]


def dat(*entries: tuple[str | bytes, int, list[float]], tail: bytes = b"", total: int | None = None) -> bytes:
    out = struct.pack("<i", len(entries) if total is None else total)
    for name, calls, values in entries:
        raw = name.encode() if isinstance(name, str) else name
        out += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, len(values))
        out += struct.pack(f"<{len(values)}f", *values)
    return out + tail


# writing ------------------------------------------------------------------------------------------------------------
def test_gguf_kind_as_gguf_py_reads_it(tmp_path: Path) -> None:
    imatrix.write(tmp_path / "i.gguf", example())
    found = gguf.GGUFReader(tmp_path / "i.gguf")
    assert found.fields["general.type"].contents() == "imatrix"
    assert found.fields["imatrix.datasets"].contents() == ["c4, 2 x 512 tokens", "äöü.txt"]
    assert [found.fields[f"imatrix.chunk_{k}"].contents() for k in ("count", "size")] == [3, 512]
    assert found.fields["imatrix.chunk_count"].types == [gguf.GGUFValueType.UINT32]
    names = sorted(example().entries)
    assert [t.name for t in found.tensors] == [n + e for n in names for e in (".in_sum2", ".counts")]
    shapes = {t.name: t.shape.tolist() for t in found.tensors}  # innermost first, as ggml counts
    assert shapes["blk.0.attn_q.weight.in_sum2"] == [4] and shapes["blk.0.attn_q.weight.counts"] == [1]
    assert shapes["blk.1.ffn_up_exps.weight.in_sum2"] == [5, 3]
    assert shapes["blk.1.ffn_up_exps.weight.counts"] == [1, 3]
    assert {t.tensor_type.name for t in found.tensors} == {"F32"}
    means = meant_by_gguf(tmp_path / "i.gguf")
    for name, sums in example().entries.items():
        assert means[name] == pytest.approx(sums.mean.reshape(-1).tolist(), rel=1e-6), name
    assert means["blk.1.ffn_up_exps.weight"][5:10] == [1] * 5, "an expert that saw nothing"


def test_old_kind_byte_by_byte(tmp_path: Path) -> None:
    imatrix.write(tmp_path / "i.dat", example())
    entries, chunks, text = parsed((tmp_path / "i.dat").read_bytes())
    assert chunks == 3 and text.decode() == "äöü.txt"
    assert list(entries) == ["blk.0.attn_q.weight", "blk.1.ffn_up_exps.weight"], "sorted; what saw nothing is left out"
    for name, (calls, values) in entries.items():
        sums = example().entries[name]
        assert calls == math.ceil(sums.counts.max() / 512)
        wanted = [float(s) / c * calls if c else calls for row, c in zip(sums.sums, sums.counts, strict=True)
                  for s in row]
        assert values == pytest.approx(wanted, rel=1e-6), name


def test_the_page_on_these_files_is_true(tmp_path: Path) -> None:
    """Its examples by hand: `offset  bytes  what they are`, `…` for bytes left out."""
    one = Imatrix({"t": Sums(np.array([[6, 24]], np.float32), np.array([12]))}, ["abc"], 2, 8)
    pages = (Path(__file__).parents[2] / "docs/formats/imatrix.md").read_text().split("### By hand")[1:]
    for name, page in zip(("i.gguf", "i.dat"), pages, strict=True):
        imatrix.write(tmp_path / name, one)
        raw = (tmp_path / name).read_bytes()
        lines = re.findall(r"^ *(\d+)  ((?:(?:[0-9a-f]{2}|…) +)+)", page, re.MULTILINE)
        assert len(lines) > 5
        for at, written in lines:
            for part in re.split(r"….*", written)[:1]:  # what stands before something left out
                wanted = bytes.fromhex(part)
                assert raw[int(at):int(at) + len(wanted)] == wanted, (name, at)


@pytest.mark.parametrize("name", ["i.gguf", "i.dat"])
def test_comes_back(name: str, tmp_path: Path) -> None:
    imatrix.write(tmp_path / name, example())
    got = imatrix.read(tmp_path / name)
    assert got.chunks == 3 and got.datasets == (example().datasets if name == "i.gguf" else ["äöü.txt"])
    for key, sums in got.entries.items():
        assert np.allclose(sums.mean.reshape(-1), example().entries[key].mean.reshape(-1), rtol=1e-6, atol=0), key
    imatrix.write(tmp_path / f"again-{name}", got)
    assert (tmp_path / f"again-{name}").read_bytes() == (tmp_path / name).read_bytes()


def test_nothing_is_overwritten_or_left_behind(tmp_path: Path) -> None:
    imatrix.write(tmp_path / "i.gguf", example())
    with pytest.raises(FewbitsError, match="exists already"):
        imatrix.write(tmp_path / "i.gguf", example())
    with pytest.raises(FewbitsError, match="of no tensor"):
        imatrix.write(tmp_path / "j.gguf", Imatrix({}))
    with pytest.raises(FewbitsError, match="does not fit UINT32"):
        imatrix.write(tmp_path / "j.gguf", Imatrix(example().entries, [], -1))
    assert [p.name for p in tmp_path.iterdir()] == ["i.gguf"]


# reading ------------------------------------------------------------------------------------------------------------
def written(path: Path, tensors: dict[str, np.ndarray], **changed: object) -> Path:
    """A file by gguf-py; `changed` keys replace those of every importance matrix, None leaves one out."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()  # it begins with general.architecture, which these files do not have
    keys = {"type": "imatrix", "datasets": ["some text"], "chunk_count": 7, "chunk_size": 128} | changed
    if keys["type"] is not None:
        writer.add_string("general.type", str(keys["type"]))
    if keys["datasets"] is not None:
        writer.add_array("imatrix.datasets", keys["datasets"])
    for key in ("chunk_count", "chunk_size"):
        if isinstance(keys[key], str):
            writer.add_string(f"imatrix.{key}", keys[key])
        elif keys[key] is not None:
            writer.add_uint32(f"imatrix.{key}", keys[key])
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(sums: object, counts: object, name: str = "blk.0.attn_q.weight") -> dict[str, np.ndarray]:
    return {name + ".in_sum2": np.array(sums, np.float32), name + ".counts": np.array(counts, np.float32)}


def test_reads_what_gguf_py_wrote(tmp_path: Path) -> None:
    stack = pair([[2, 4, 8], [0, 0, 0]], [[4], [0]], "blk.0.ffn_up_exps.weight")
    path = written(tmp_path / "i.bin", pair([3.0, 6.0], [6.0]) | stack | {"x.in_sum": np.ones(3, np.float32)})
    got = imatrix.read(path)  # of any name
    assert (got.datasets, got.chunks, got.chunk_size) == (["some text"], 7, 128)
    assert got.entries["blk.0.attn_q.weight"].mean.tolist() == [[0.5, 1]]
    assert got.entries["blk.0.ffn_up_exps.weight"].mean.tolist() == [[0.5, 1, 2], [1, 1, 1]]
    assert got.unseen == ["blk.0.ffn_up_exps.weight"] and len(got.entries) == 2
    assert imatrix.is_imatrix(path) and not imatrix.is_imatrix(tmp_path)


def test_reads_the_old_kind(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"  # the name says nothing
    text = b"wiki.train.raw"
    path.write_bytes(dat(("blk.0.attn_q.weight", 4, [2.0, 6.0]), ("old", 0, [0.5]),
                         tail=struct.pack("<ii", 4, len(text)) + text))
    got = imatrix.read(path)
    assert got.entries["blk.0.attn_q.weight"].mean.tolist() == [[0.5, 1.5]]
    assert got.entries["old"].mean.tolist() == [[0.5]], "with 0 calls the values are means"
    assert (got.chunks, got.datasets) == (4, ["wiki.train.raw"])
    imatrix.write(tmp_path / "new.gguf", got)  # sums and counts as `llama-imatrix --in-file` makes them of it
    found = {t.name: t.data.tolist() for t in gguf.GGUFReader(tmp_path / "new.gguf").tensors}
    assert found["blk.0.attn_q.weight.in_sum2"] == [2 * CHUNK, 6 * CHUNK]
    assert found["blk.0.attn_q.weight.counts"] == [4 * CHUNK]


@pytest.mark.parametrize("tail, chunks", [(b"", 0), (struct.pack("<i", 9), 9), (struct.pack("<ii", 9, 0), 9)])
def test_the_oldest_files_end_sooner(tail: bytes, chunks: int, tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(dat(("a", 1, [1.0]), tail=tail))
    got = imatrix.read(tmp_path / "i.dat")
    assert got.chunks == chunks and got.datasets == []


HUGE = 2**31 - 1
OLD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "neither a GGUF file nor an importance matrix"),
    "a text": (b"Once upon a time there was a dog", "neither a GGUF file nor an importance matrix"),
    "no entries": (dat(total=0) + b"\0" * 40, "neither"),
    "negative entries": (dat(("a", 1, [1.0]), total=-1), "neither"),
    "more entries than fit": (dat(("a", 1, [1.0]), total=HUGE), "neither"),
    "an entry is missing": (dat(("abcdefghi", 1, [1.0] * 9), total=2), "ends inside the length of the name of entry 1"),
    "name past the end": (struct.pack("<ii", 1, HUGE) + b"a" * 20, "the name of entry 0 has 2147483647 bytes; 20 are"),
    "name of -1": (struct.pack("<ii", 1, -1) + b"a" * 20, "has -1 bytes"),
    "no name": (dat(("", 1, [1.0, 2.0])), "the name of entry 0 has 0 bytes"),
    "name not UTF-8": (dat((b"\xff\xfe", 1, [1.0])), "the name of entry 0 is not valid UTF-8 at its byte 0"),
    "no values": (dat(("abcdefgh", 1, [])), "tensor 'abcdefgh' has 0 values"),
    "values past the end": (struct.pack("<ii1sii", 1, 1, b"a", 1, HUGE) + b"\0" * 8, "tensor 'a' has 2147483647 val"),
    "cut in the values": (dat(("abc", 1, [1.0, 2.0, 3.0]))[:-2], "tensor 'abc' has 3 values; 10 bytes are left"),
    "cut in the tail": (dat(("a", 1, [1.0]), tail=b"\1\0"), "ends inside the number of chunks"),
    "text past the end": (dat(("a", 1, [1.0]), tail=struct.pack("<ii", 1, 9) + b"abc"), "the name of the text has 9"),
    "more after the end": (dat(("a", 1, [1.0]), tail=struct.pack("<ii", 1, 1) + b"abc"), "2 bytes after its end"),
    "twice": (dat(("a", 1, [1.0]), ("a", 1, [1.0])), "tensor 'a' appears twice"),
    "negative calls": (dat(("a", -1, [1.0])), "tensor 'a' has -1 calls"),
    "NaN": (dat(("a", 1, [1.0, math.nan])), "tensor 'a' has a sum of squares of nan"),
    "infinite": (dat(("a", 1, [math.inf])), "tensor 'a' has a sum of squares of inf"),
    "negative": (dat(("a", 1, [1.0, -2.0])), "tensor 'a' has a sum of squares of -1024.0"),
}


@pytest.mark.parametrize("case", OLD)
def test_hostile_old_files(case: str, tmp_path: Path) -> None:
    raw, message = OLD[case]
    path = tmp_path / "i.dat"
    path.write_bytes(raw)
    with pytest.raises(FewbitsError, match=message) as error:
        imatrix.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


Q = "blk.0.attn_q.weight"
NEW: dict[str, tuple[dict[str, np.ndarray], dict, str]] = {
    "a model": (pair([1], [1]), {"type": "model"}, "is no importance matrix: general.type is 'model'"),
    "no type": (pair([1], [1]), {"type": None}, "general.type does not say"),
    "no datasets": (pair([1], [1]), {"datasets": None}, "imatrix.datasets is missing"),
    "datasets of numbers": (pair([1], [1]), {"datasets": [1, 2]}, "imatrix.datasets is INT32 ARRAY; ARRAY"),
    "no chunk count": (pair([1], [1]), {"chunk_count": None}, "imatrix.chunk_count is missing"),
    "chunk size a text": (pair([1], [1]), {"chunk_size": "x"}, "imatrix.chunk_size is STRING; UINT32 is expected"),
    "no tensors": ({"x": np.ones(1, np.float32)}, {}, "an importance matrix of no tensor"),
    "no counts": ({Q + ".in_sum2": np.ones(3, np.float32)}, {}, "'blk.0.attn_q.weight.counts' is missing"),
    "no sums": ({Q + ".counts": np.ones(3, np.float32)}, {}, "'blk.0.attn_q.weight.in_sum2' is missing"),
    "counts do not divide": (pair([1, 2, 3], [1, 1]), {}, "'blk.0.attn_q.weight' has 3 sums for 2 counts"),
    "float16": ({Q + ".in_sum2": np.ones(3, np.float16)}, {}, "is F16; F32 is expected"),
    "NaN": (pair([1, math.nan], [1]), {}, "tensor 'blk.0.attn_q.weight' has a sum of squares of nan"),
    "negative": (pair([1, -1], [1]), {}, "has a sum of squares of -1.0"),
    "infinite": (pair([1, math.inf], [1]), {}, "has a sum of squares of inf"),
    "count NaN": (pair([1], [math.nan]), {}, "has a count of nan"),
    "count negative": (pair([1, 2], [1, -3]), {}, "has a count of -3.0"),
    "count beyond belief": (pair([1], [1e30]), {}, "has a count of 1"),
}


@pytest.mark.parametrize("case", NEW)
def test_hostile_gguf_files(case: str, tmp_path: Path) -> None:
    tensors, keys, message = NEW[case]
    path = written(tmp_path / "i.gguf", tensors, **keys)
    with pytest.raises(FewbitsError, match=message) as error:
        imatrix.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_cut_short_anywhere(tmp_path: Path) -> None:
    imatrix.write(tmp_path / "whole.gguf", example())
    raw = (tmp_path / "whole.gguf").read_bytes()
    for size in range(0, len(raw) - 32, 7):
        (tmp_path / "cut").write_bytes(raw[:size])
        with pytest.raises(FewbitsError):
            imatrix.read(tmp_path / "cut")
