"""The safetensors file itself: equal bytes with the library's, lazily mapped, hostile files refused."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch

from fewbits.containers.safetensors import DTYPES, SafeTensors, Writer
from fewbits.errors import FewbitsError
from tests.containers.hostile_safetensors import file_bytes


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
    path = tmp_path / "file"
    path.write_bytes(file_bytes(header, b"\x07" + struct.pack("<2f", 1.5, -2.0)))
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
