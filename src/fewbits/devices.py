"""Devices by name: `cpu`, `cuda`, `cuda:1`, `auto`; ROCm's GPUs are called cuda as well."""

from __future__ import annotations

from fewbits.errors import FewbitsError
from fewbits.lazy import torch
from fewbits.memory import available_bytes

KINDS = ("cuda", "xpu")  # NVIDIA's and AMD's, Intel's
UNASKED = KINDS  # those that are taken where no device is named


def find(name: str | torch.device | None = None) -> torch.device:
    """The device called `name`; of None and "auto", the GPU that torch computes on if there is one, else the CPU.

    Raises:
        FewbitsError: torch knows no such device, or sees none here.
    """
    if name in (None, "auto"):
        name = accelerator() or "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise FewbitsError(f"unknown device {name!r}", "one of: auto, cpu, cuda, cuda:1") from None
    if device.type == "cpu":
        return torch.device("cpu")
    backend = getattr(torch, device.type) if device.type in KINDS else None
    count = backend.device_count() if backend and backend.is_available() else 0
    if not count:
        raise FewbitsError(f"no GPU: torch {torch.__version__} sees no {device.type} device", "leave --device out, or "
                           "install a torch for this machine's GPU: https://pytorch.org/get-started/locally")
    if (device.index or 0) >= count:
        raise FewbitsError(f"{device}: there are {count} {device.type} devices, numbered from 0")
    if device.index is not None:
        return device
    return torch.device(device.type, backend.current_device())  # of a rank of torchrun, its own


def accelerator() -> str | None:
    """The kind of GPU that is taken where none is named, if torch sees one here."""
    return next((kind for kind in UNASKED if getattr(torch, kind).is_available()), None)


def at_once(device: torch.device, few: int) -> int:
    """How many weights to compute with at a time: `few`, which stay in the caches, on a CPU; on a GPU so many that
    starting its kernels takes no part of the time.
    """
    return few if device.type == "cpu" else max(few, 1 << 24)


def free_bytes(device: torch.device) -> int:
    """Memory of a device that can be had: what is free, and what torch holds of it unused."""
    if device.type == "cpu":
        return available_bytes()
    backend = getattr(torch, device.type)
    free, _ = backend.mem_get_info(device)
    return int(free + backend.memory_reserved(device) - backend.memory_allocated(device))
