"""Every hostile file and directory gets its message, in little time and memory; odd but sound ones are read."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewbits
from fewbits import containers
from fewbits.containers.directory import TransformersDirectory
from fewbits.containers.safetensors import SafeTensors
from fewbits.errors import FewbitsError
from tests.containers import hostile_safetensors as hostile


def opened(path: Path) -> None:
    for entry in containers.open(path).entries.values():
        entry.load().dequantize()


def refused(path: Path, message: str) -> None:
    """A FewbitsError that names the path and says `message`, at no more memory than four times the files."""
    size = sum(f.stat().st_size for f in path.iterdir() if f.is_file())
    tracemalloc.start()
    try:
        with pytest.raises(FewbitsError, match=message) as error:
            opened(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000 and str(error.value).isprintable()
    assert peak <= 4 * size + 4_000_000  # what imports and regular expressions keep


@pytest.mark.parametrize("case", hostile.FILES)
def test_hostile_files(tmp_path, case):
    header, data, length, message = hostile.FILES[case]
    files = hostile.model() | {"model.safetensors": hostile.file_bytes(header, data, length)}
    refused(hostile.lay(tmp_path / "m", files), message)


@pytest.mark.parametrize("case", hostile.DIRECTORIES)
def test_hostile_directories(tmp_path, case):
    make, message = hostile.DIRECTORIES[case]
    refused(hostile.lay(tmp_path / "m", make()), message)


@pytest.mark.parametrize("case", hostile.ZEROS)
def test_scales_of_zero_are_zeros(tmp_path, case):
    found = containers.open(hostile.lay(tmp_path / "m", hostile.ZEROS[case]())).entries
    assert list(found) == ["x.weight"] and not found["x.weight"].load().dequantize().any()


def test_a_snapshot_of_links(tmp_path):
    """The hub's cache: links in a snapshot, files elsewhere."""
    blobs = hostile.lay(tmp_path / "blobs", {"a": hostile.model()["model.safetensors"]})
    snapshot = hostile.lay(tmp_path / "snapshot", hostile.model() | {"model.safetensors": blobs / "a"})
    assert list(containers.open(snapshot).entries) == ["x.weight"]


def test_code_in_a_configuration_is_not_run(tmp_path):
    """`auto_map` names Python files beside the weights; nothing looks at them."""
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\n".encode()
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    path = hostile.lay(tmp_path / "m", hostile.model(auto_map=auto_map, architectures=["Evil"]) | {
        "evil.py": evil,
        "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}}).encode()})
    opened(path)
    with pytest.raises(FewbitsError, match="code of its own"):
        fewbits.load(path)
    assert not (tmp_path / "ran").exists()


def tiny_tensors(folder, count):
    header = ",".join(f'"{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(count))
    return hostile.lay(folder, hostile.model() | {
        "model.safetensors": hostile.file_bytes(b"{" + header.encode() + b"}", bytes(count))})


def test_many_tiny_tensors(tmp_path):
    """Linear in their number: a hundred thousand take about 2 s."""
    path = tiny_tensors(tmp_path / "m", 100_000)
    began = time.process_time()
    assert len(containers.open(path).buffers) == 100_000
    assert time.process_time() - began < 10


def test_a_million_tiny_tensors_are_refused_before_their_names_are_read(tmp_path):
    path = tiny_tensors(tmp_path / "m", 1_000_000)
    size = (path / "model.safetensors").stat().st_size
    began = time.process_time()
    tracemalloc.start()
    with pytest.raises(FewbitsError, match="has more than 131072 tensors"):
        containers.open(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * size and time.process_time() - began < 5


SOUND = {"model.embed_tokens.weight": torch.arange(12.0).reshape(4, 3), "b": torch.arange(3), "c": torch.ones(2).half()}


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_changed_headers_open_or_are_refused(tmp_path_factory, data):
    whole = bytearray(safetensors.torch.save(SOUND, {"format": "pt"}))
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, length - 1))
        how = data.draw(st.sampled_from(["set", "cut", "insert", "digit"]))
        byte = data.draw(st.sampled_from(b'0123456789"[]{},:-.eE\\ \xff\x00')) if how == "digit" else \
            data.draw(st.integers(0, 255))
        if how == "cut":
            del whole[at]
        elif how == "insert":
            whole.insert(at, byte)
        else:
            whole[at] = byte
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(whole)
    try:
        for raw in SafeTensors(path).tensors.values():
            assert len(raw.data()) == raw.end - raw.start and raw.tensor().shape == raw.shape
    except FewbitsError as error:
        assert str(path) in str(error)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    path = hostile.lay(tmp_path / "m", hostile.model())
    entry = TransformersDirectory().read(path).entries["x.weight"]
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FewbitsError, match="its size changed"):
        entry.load()
