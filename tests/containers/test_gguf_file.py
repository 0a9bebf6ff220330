"""GGUF on the level of bytes: against the gguf package, and against files that lie."""

from __future__ import annotations

import resource
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbits.containers import gguf_file
from fewbits.containers.gguf_file import FORMATS, Spec, Value
from fewbits.errors import FewbitsError
from tests.containers.hostile_gguf import ARRAY, HOSTILE, file, pair, record, strings

RANGES = {"UINT8": (0, 2**8 - 1), "INT8": (-2**7, 2**7 - 1), "UINT16": (0, 2**16 - 1), "INT16": (-2**15, 2**15 - 1),
          "UINT32": (0, 2**32 - 1), "INT32": (-2**31, 2**31 - 1), "UINT64": (0, 2**64 - 1),
          "INT64": (-2**63, 2**63 - 1)}
METADATA = {
    "general.architecture": Value("STRING", "llama"), "a.bool": Value("BOOL", True), "a.float": Value("FLOAT32", 0.5),
    "a.double": Value("FLOAT64", 0.1), "a.strings": Value("ARRAY", ["", "é", "▁x\0y"], "STRING"),
    "a.bools": Value("ARRAY", np.array([True, False]), "BOOL"), "a.none": Value("ARRAY", [], "STRING"),
    **{f"a.{t}": Value(t, high) for t, (_, high) in RANGES.items()},
    **{f"a.{t}s": Value("ARRAY", np.array([low, high], FORMATS[t]), t) for t, (low, high) in RANGES.items()},
}
BASE = 1 << 20  # bytes of memory that any file may take
SPECS = [Spec("x", (3, 32), "Q8_0"), Spec("y", (5,), "F32"), Spec("z", (2, 3, 4), "F16")]


@pytest.fixture
def sample(tmp_path):
    path = tmp_path / "sample.gguf"
    data = [np.random.default_rng(i).integers(0, 256, s.nbytes, np.uint8) for i, s in enumerate(SPECS)]
    gguf_file.write(path, METADATA, SPECS, data)
    return path, data


def _equal(a: Value, b: Value) -> bool:
    return (a.type, a.items) == (b.type, b.items) and np.array_equal(a.value, b.value)


def test_everything_comes_back_with_its_type(sample):
    path, data = sample
    file = gguf_file.read(path)
    assert list(file.metadata) == list(METADATA)
    assert all(_equal(file.metadata[k], v) for k, v in METADATA.items())
    for spec, wanted in zip(SPECS, data, strict=True):
        found = file.tensors[spec.name]
        assert (found.shape, found.type) == (spec.shape, spec.type)
        assert np.array_equal(file.data(found), wanted)


def test_the_gguf_package_reads_the_same(sample):
    path, data = sample
    reader = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        field = reader.get_field(key)
        empty = value.type == "ARRAY" and len(value.value) == 0  # of those it tells neither type nor contents
        assert [t.name for t in field.types] == [value.type, *([value.items] if value.items and not empty else [])]
        if not empty:
            assert np.array_equal(field.contents(), value.value), key
    for tensor, spec, wanted in zip(reader.tensors, SPECS, data, strict=True):
        assert (tensor.name, tuple(tensor.shape)[::-1], tensor.tensor_type.name) == (spec.name, spec.shape, spec.type)
        assert np.array_equal(tensor.data.reshape(-1).view(np.uint8), wanted)


def test_what_the_gguf_package_writes_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_uint32("n", 7)
    writer.add_array("words", ["a", "b"])
    writer.add_custom_alignment(64)
    writer.add_tensor("w", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("v", np.arange(3, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = gguf_file.read(tmp_path / "a.gguf")
    assert file.metadata["n"] == Value("UINT32", 7)
    assert file.metadata["words"] == Value("ARRAY", ["a", "b"], "STRING")
    assert file.tensors["w"].shape == (2, 3)
    assert file.tensors["v"].offset == 64
    assert file.data(file.tensors["w"]).view(np.float32).tolist() == [0, 1, 2, 3, 4, 5]


def test_the_layout_of_bytes_by_hand(tmp_path):
    gguf_file.write(tmp_path / "a", {"k": Value("UINT8", 5)}, [Spec("t", (1, 2), "F32")],
                    [np.array([1, 2], np.float32).view(np.uint8)])
    header = (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IB", 0, 5)
              + struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 2, 1, 0, 0))
    wanted = header + b"\0" * (-len(header) % 32) + struct.pack("<2f", 1, 2)
    assert (tmp_path / "a").read_bytes() == wanted + b"\0" * (-len(wanted) % 32)


def test_version_2_is_read(sample):
    path, _ = sample
    raw = bytearray(path.read_bytes())
    raw[4] = 2
    path.write_bytes(raw)
    assert gguf_file.read(path).version == 2


def test_a_value_that_does_not_fit_its_type_is_named(tmp_path):
    with pytest.raises(FewbitsError, match="k = -1 does not fit UINT32"):
        gguf_file.write(tmp_path / "a", {"k": Value("UINT32", -1)}, [], [])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_large_tensor_is_mapped_and_not_copied(tmp_path):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    path, specs = tmp_path / "large.gguf", [Spec("w", (1 << 15, 1 << 15), "Q8_0")]
    with open(path, "wb") as out:  # 1.1 GB, of which nothing is on disk
        out.write(gguf_file.header({}, specs))
        out.truncate(128 + specs[0].nbytes)
    before = resident()
    data = gguf_file.read(path)
    found = data.data(data.tensors["w"])
    assert found.nbytes == specs[0].nbytes and found[-1] == 0
    assert resident() - before < 10 << 20


# files that lie -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name_in_little_memory(tmp_path, name):
    raw, message = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(FewbitsError, match=message) as error:
            gguf_file.read(path)
        assert "hostile.gguf" in str(error.value)
        assert tracemalloc.get_traced_memory()[1] < (1 << 20) + 4 * len(raw)
    finally:
        tracemalloc.stop()


def test_many_tensors_take_little_memory(tmp_path):
    path = tmp_path / "many.gguf"
    records = tuple(record(f"t{i}", (1,), offset=32 * i) for i in range(10_000))
    path.write_bytes(file(records=records, data=32 * len(records)))
    tracemalloc.start()
    try:
        found = gguf_file.read(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * path.stat().st_size + BASE
    finally:
        tracemalloc.stop()
    assert len(found.tensors) == 10_000


@pytest.mark.parametrize("words", [["ab"] * 50_000, [""] * 50_000, ["é" * 500, "x"] * 5000])
def test_strings_take_little_memory_however_short(tmp_path, words):
    path = tmp_path / "words.gguf"
    path.write_bytes(file(pair("k", ARRAY, strings(*words))))
    tracemalloc.start()
    try:
        found = gguf_file.read(path).metadata["k"].value
        assert tracemalloc.get_traced_memory()[1] < 4 * path.stat().st_size + BASE
    finally:
        tracemalloc.stop()
    assert found == words and found[-1] == words[-1] and found[3:5] == words[3:5]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(sample, data):
    path, _ = sample
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    damaged = path.with_suffix(".damaged")
    damaged.write_bytes(raw[:data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        file = gguf_file.read(damaged)
    except FewbitsError as error:
        assert str(damaged) in str(error)
    else:
        assert sum(file.data(s).nbytes for s in file.tensors.values()) <= len(raw)


def test_every_truncation_is_refused(sample):
    path, _ = sample
    raw = path.read_bytes()
    end = gguf_file.read(path)
    last = max(s.offset + s.nbytes for s in end.tensors.values()) + end.start
    for size in range(0, last, 7):
        path.write_bytes(raw[:size])
        with pytest.raises(FewbitsError):
            gguf_file.read(path)
