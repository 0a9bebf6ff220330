"""The safetensors file itself: equal bytes with the library's, lazily mapped, hostile files refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch

from fewbits.containers.safetensors import DTYPES, SafeTensors, Writer
from fewbits.errors import FewbitsError


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, (torch_name, size) in DTYPES.items():
        dtype = getattr(torch, torch_name)
        for shape in ((3, 5), (7,), (), (0, 4)):
            count = int(torch.tensor(shape).prod()) if shape else 1
            raw = torch.randint(0, 2 if name == "BOOL" else 256, (count * size,), generator=generator,
                                dtype=torch.uint8)
            found[f"{name}.{len(shape)}.{count}"] = raw.view(dtype).reshape(shape)
    return found


def specs(found: dict[str, torch.Tensor]):
    names = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
    return {k: (names[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for k, t in found.items()}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def test_writes_the_bytes_of_the_library(tmp_path):
    found = tensors()
    safetensors.torch.save_file(found, tmp_path / "theirs", {"format": "pt"})
    with Writer(tmp_path / "ours", specs(found), {"format": "pt"}) as out:
        for name, tensor in reversed(found.items()):  # any order
            out.write(name, tensor)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_reads_what_the_library_wrote(tmp_path):
    found = tensors()
    safetensors.torch.save_file(found, tmp_path / "file", {"format": "pt"})
    file = SafeTensors(tmp_path / "file")
    assert file.metadata == {"format": "pt"} and file.tensors.keys() == found.keys()
    for name, tensor in found.items():
        assert same_bytes(file.tensors[name].tensor(), tensor), name


def test_tensors_share_one_mapping_and_torch_does_not_warn(tmp_path, recwarn):
    safetensors.torch.save_file({"a": torch.arange(6.0), "b": torch.arange(3)}, tmp_path / "file")
    file = SafeTensors(tmp_path / "file")
    a, b = file.tensors["a"].tensor(), file.tensors["b"].tensor()
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() == file.base().data_ptr()
    assert not recwarn.list


def test_unaligned_tensors_are_copied(tmp_path):
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
              "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}
    path = write(tmp_path, header, b"\x07" + struct.pack("<2f", 1.5, -2.0))
    assert SafeTensors(path).tensors["b"].tensor().tolist() == [1.5, -2.0]


def test_the_header_is_read_without_torch(tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(2, 3)}, tmp_path / "file")
    code = ("import sys; from pathlib import Path; from fewbits.containers.safetensors import SafeTensors;"
            f"print(SafeTensors(Path({str(tmp_path / 'file')!r})).tensors['a'].spec, 'torch' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "('F32', (2, 3)) False"


def test_a_tensor_announced_must_be_written(tmp_path):
    with pytest.raises(ValueError, match="b was announced"), \
            Writer(tmp_path / "file", {"a": ("F32", (1,)), "b": ("F32", (1,))}) as out:
        out.write("a", torch.ones(1))


@pytest.mark.parametrize("tensor", [torch.ones(2), torch.ones(1).half()])
def test_a_tensor_must_be_as_announced(tmp_path, tensor):
    with pytest.raises(ValueError, match="announced as F32"), Writer(tmp_path / "file", {"a": ("F32", (1,))}) as out:
        out.write("a", tensor)


def write(folder, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def one(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}}


EIGHT = bytes(8)
HOSTILE = {
    "zero header": (b"", b"", 0, "header of 0 bytes"),
    "huge header": (b"{}", b"", 2**63, "header of 9223372036854775808 bytes"),
    "header longer than the file": (b"{}", b"", 3, "header of 3 bytes cannot be in a file of 10 bytes"),
    "not JSON": (b"{nonsense", b"", None, "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "not JSON"),
    "nested too deep": (b"[" * 200_000, b"", None, "not JSON"),
    "a list": (b"[]", b"", None, "not a JSON object"),
    "duplicate names": (b'{"a": {}, "a": {}}', b"", None, "'a' appears twice"),
    "metadata": ({"__metadata__": 3}, b"", None, "__metadata__"),
    "no dtype": ({"a": {"shape": [], "data_offsets": [0, 0]}}, b"", None, "a: needs dtype"),
    "more keys": (one(extra=1), EIGHT, None, "a: needs dtype"),
    "unknown dtype": (one("F3"), EIGHT, None, "a: unknown dtype 'F3'"),
    "dtype of another kind": (one(["F32"]), EIGHT, None, "a: unknown dtype"),
    "negative shape": (one(shape=(-2,)), EIGHT, None, r"a: shape \[-2\]"),
    "fractional shape": (one(shape=(2.0,)), EIGHT, None, r"a: shape \[2.0\]"),
    "true as a dimension": (one(shape=(True, 2)), EIGHT, None, "a: shape"),
    "negative offset": (one(offsets=(-8, 0)), EIGHT, None, r"a: data_offsets \[-8, 0\]"),
    "three offsets": (one(offsets=(0, 4, 8)), EIGHT, None, "a: data_offsets"),
    "offsets swapped": (one(offsets=(8, 0)), EIGHT, None, "a: data_offsets"),
    "offset behind the end": (one(offsets=(8, 16)), EIGHT, None, r"a: data_offsets \[8, 16\] in 8 bytes"),
    "shape and length differ": (one(shape=(3,)), EIGHT, None, "takes 12 bytes"),
    "overflowing shape": (one(shape=(2**62, 2**62)), EIGHT, None, "takes 8507"),
    "hole at the beginning": (one(offsets=(8, 16)), EIGHT * 2, None, "a: begins at byte 8 .*hole"),
    "overlap": (one() | {"b": one(offsets=(4, 12))["a"]}, bytes(12), None, "b: begins at byte 4 .*overlap"),
    "hole in between": (one() | {"b": one(offsets=(12, 20))["a"]}, bytes(20), None, "b: begins at byte 12 .*hole"),
    "bytes behind": (one(), bytes(9), None, "1 bytes behind the last tensor"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(tmp_path, case):
    header, data, length, message = HOSTILE[case]
    path = write(tmp_path, header, data, length)
    with pytest.raises(FewbitsError, match=message) as error:
        SafeTensors(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("size", range(8))
def test_a_file_of_a_few_bytes(tmp_path, size):
    (tmp_path / "file").write_bytes(bytes(size))
    with pytest.raises(FewbitsError, match="too few"):
        SafeTensors(tmp_path / "file")


def test_every_truncation_of_a_sound_file_is_refused(tmp_path):
    safetensors.torch.save_file({"a": torch.arange(5.0), "b": torch.arange(3)}, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for size in range(len(data)):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(FewbitsError):
            SafeTensors(tmp_path / "cut")
