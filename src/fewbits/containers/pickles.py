"""Pickled weights (`*.pt`, `*.bin`), opened on request only, by torch's loader that builds tensors and runs no code."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewbits.containers.base import flat_bytes
from fewbits.containers.safetensors import DTYPES, Raw, SafeTensors
from fewbits.errors import FewbitsError
from fewbits.lazy import torch

SUFFIXES = (".pt", ".pth", ".bin")
INDEX = "pytorch_model.bin.index.json"
NOT_ASKED = "a pickle can run code when it is opened: --allow-pickle reads its tensors and runs nothing"


class Pickle(SafeTensors):
    """A pickle's tensors behind the face of a safetensors file.

    Raises:
        FewbitsError: not a pickle of named tensors, or one that wants to do more.
    """

    def __init__(self, path: Path):
        self.path, self.size, self.metadata = path, path.stat().st_size, {}
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # a broken pickle raises whatever its last instruction does
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise FewbitsError(f"{path}: not a pickle of tensors alone: {first}",
                               "what needs code of its own is not read; convert it to safetensors") from None
        if not isinstance(found, dict):
            raise FewbitsError(f"{path}: holds {type(found).__name__}, where named tensors were expected")
        names = {getattr(torch, torch_name): name for name, (torch_name, _) in DTYPES.items()}
        self.tensors = {}
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
                raise FewbitsError(f"{path}: {name}: {type(value).__name__}, where a tensor was expected")
            if value.dtype not in names:
                raise FewbitsError(f"{path}: {name}: {value.dtype} tensors are not read")
            size = value.numel() * value.element_size()
            if size > value.untyped_storage().nbytes():
                raise FewbitsError(f"{path}: {name}: {list(value.shape)} takes {size} bytes, and "
                                   f"{value.untyped_storage().nbytes()} are there")
            self.tensors[name] = PickledRaw(self, name, names[value.dtype], tuple(value.shape), 0, size, value.detach())


@dataclass(frozen=True)
class PickledRaw(Raw):
    """A tensor of a pickle; large ones stay in the file until they are used."""

    value: torch.Tensor

    def data(self) -> bytes:
        return bytes(flat_bytes(self.value).numpy().data)

    def array(self) -> np.ndarray | None:
        return None

    def tensor(self) -> torch.Tensor:
        return self.value.contiguous()


def is_pickled(path: Path) -> bool:
    """Whether a model is in pickles: a file by its suffix, a directory that has nothing else."""
    if path.is_file():
        return path.suffix in SUFFIXES
    return not any(path.glob("*.safetensors*")) and any(_files(path))


def raw_tensors(path: Path) -> dict[str, Raw]:
    """Every tensor of a pickle, or of all pickles of a directory.

    Raises:
        FewbitsError: a file that is missing or no pickle of tensors, a tensor in two files.
    """
    raws: dict[str, Raw] = {}
    for file in [path] if path.is_file() else _files(path):
        if not file.is_file():
            raise FewbitsError(f"{path / INDEX}: names the file {file.name}, which is missing",
                               "fetch the missing file")
        for name, raw in Pickle(file).tensors.items():
            if name in raws:
                raise raw.refuse(f"is in {raws[name].file.path.name} too")
            raws[name] = raw
    return raws


def _files(path: Path) -> list[Path]:
    """The pickles of a directory: those that its index names, or the only one."""
    if (path / INDEX).is_file():
        try:
            names = sorted(map(str, set(json.loads((path / INDEX).read_bytes())["weight_map"].values())))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise FewbitsError(f"{path / INDEX}: weight_map is not an object of tensor names") from None
        for name in names:
            if Path(name).name != name or Path(name).suffix not in SUFFIXES:
                raise FewbitsError(f"{path / INDEX}: {name!r} is not the name of a file in this directory")
        return [path / name for name in names]
    found = sorted(f for f in path.glob("*") if f.suffix in SUFFIXES and f.name != "training_args.bin")
    if len(found) > 1:
        raise FewbitsError(f"{path}: {len(found)} pickles, and no {INDEX}", f"name one: {found[0]}")
    return found
