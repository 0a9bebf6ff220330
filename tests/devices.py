"""A GPU for tests: a real one where there is one, else a pretended one that finds tensors mixed up between devices.

The tensors of the pretended GPU lie on the CPU and say "cuda:0". Whatever a GPU would refuse is refused: operations on
tensors of both devices (but for indices and single numbers from the CPU), NumPy, native code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from fewbits import devices as known

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
KINDS = ("cuda", "cpu", "meta")
MOVES, HOME = {"to", "copy_", "cuda"}, {"cpu"}
REFUSED = {"numpy", "__array__", "__dlpack__", "data_ptr"}
ANSWERS: dict[Any, Any] = {torch.Tensor.device: GPU, torch.Tensor.is_cuda: True, torch.Tensor.is_cpu: False}


class Mixed(AssertionError):
    """A GPU would refuse this."""


class OnGpu(torch.Tensor):
    """A tensor that says that it lies on the GPU."""

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> torch.Tensor:  # as of a parameter
        return torch.nn.Parameter(data, requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> OnGpu:
        with torch._C.DisableTorchFunction():
            copy = torch.Tensor.clone(self).as_subclass(OnGpu)
            copy._is_param = getattr(self, "_is_param", False)  # type: ignore[attr-defined]
        return memo.setdefault(id(self), copy)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Pretended(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def gpu() -> Iterator[torch.device]:
    """Inside, the device that is yielded computes."""
    if torch.cuda.is_available():
        yield GPU
        return
    with _Pretended():
        yield GPU


@contextmanager
def found(free: int = 80 << 30) -> Iterator[torch.device]:
    """Inside, there is a GPU with so much memory free: the pretended one where there is none."""
    with gpu() as device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(known, "UNASKED", known.KINDS)
        patch.setattr(torch.cuda, "mem_get_info", lambda which=None: (free, free))
        for name in ("memory_reserved", "memory_allocated"):
            patch.setattr(torch.cuda, name, lambda which=None: 0)
        if not torch.cuda.is_available():
            for name, value in (("is_available", True), ("device_count", 1), ("current_device", 0)):
                patch.setattr(torch.cuda, name, lambda value=value: value)
        yield device


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunction():
        return _result(func, getattr(func, "__name__", ""), args, kwargs)


def _result(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is torch.device or name == "_parse_to":  # what `Module.to` makes of its arguments
        return func(*args, **kwargs)
    if type(kwargs.get("device")) is int:
        kwargs = kwargs | {"device": torch.device("cuda", kwargs["device"])}
    flat = tree_flatten((args, kwargs))[0]
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    there = any(isinstance(x, OnGpu) for x in tensors)
    if there and name == "__get__" and func.__self__ in ANSWERS:
        return ANSWERS[func.__self__]
    if there and name == "_has_compatible_shallow_copy_type":
        return False  # so that `Module.to` makes new parameters
    if there and name in REFUSED:
        raise Mixed(f"{name} of a tensor on the GPU")
    kinds = [x.type if isinstance(x, torch.device) else str(x).split(":")[0] for x in flat
             if isinstance(x, torch.device | str)]
    wanted = "cpu" if name in HOME else next((k for k in kinds if k in KINDS), None)
    if there and name not in MOVES and wanted is None:
        _refuse_mixed(name, args, tensors)
    args, kwargs = tree_map(_on_cpu, (args, kwargs))
    found = func(*args, **kwargs)
    if wanted in ("cpu", "meta"):
        return tree_map(lambda x: x.as_subclass(torch.Tensor) if isinstance(x, OnGpu) else x, found)
    if name == "copy_":
        return found
    return tree_map(_on_gpu, found) if there or wanted == "cuda" else found


def _refuse_mixed(name: str, args: Any, tensors: list[torch.Tensor]) -> None:
    strangers = [x for x in tensors if not isinstance(x, OnGpu) and x.ndim]
    if name == "__getitem__" and isinstance(args[0], OnGpu):
        return  # indices may lie on the CPU
    if name == "__setitem__" and not any(isinstance(x, torch.Tensor) for x in tree_flatten(args[1])[0]):
        return  # a copy
    if strangers or (tensors[0].ndim and not isinstance(tensors[0], OnGpu)):
        shapes = ", ".join(f"{list(x.shape)} on {'cuda' if isinstance(x, OnGpu) else 'cpu'}" for x in tensors)
        raise Mixed(f"{name} of {shapes}")


def _on_cpu(x: Any) -> Any:
    if isinstance(x, torch.device):
        return CPU if x.type == "cuda" else x
    return "cpu" if isinstance(x, str) and x.split(":")[0] == "cuda" else x


def _on_gpu(x: Any) -> Any:
    if not isinstance(x, torch.Tensor) or isinstance(x, OnGpu):
        return x
    return x.as_subclass(OnGpu)
