"""Where the Triton kernels can run, and why not elsewhere."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

OLDEST = (3, 4)  # gathers that compile


def interpreted() -> bool:
    """Whether Triton interprets kernels: for tests, on tensors of the CPU. It is settled when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def awaited_stores() -> str:
    """The instruction by which a wave of AMD's gfx9 GPUs waits until others see its stores; "" for other GPUs.

    Barriers there do not wait for stores, and a release that follows one waits for those of its own wave alone.
    """
    from triton.runtime import driver

    gfx9 = not interpreted() and str(driver.active.get_current_target().arch).startswith("gfx9")
    return "s_waitcnt vmcnt(0)" if gfx9 else ""


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Within it `device` is the current one: Triton launches there, wherever tensors lie."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def unavailable(device: torch.device) -> str | None:
    """Why no Triton kernel runs on `device`, or None."""
    if device.type == "cpu":
        return _missing() if interpreted() else "not on cpu"
    return _missing() or _no_driver(device.type)


@cache
def _missing() -> str | None:
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is not installed (pip install 'fewbits[gpu]')"
    old = tuple(map(int, found.split(".")[:2])) < OLDEST
    return f"triton {found} is older than {'.'.join(map(str, OLDEST))}" if old else None


@cache
def _no_driver(kind: str) -> str | None:
    from triton.runtime import driver

    try:
        target = driver.active.get_current_target()
    except Exception as error:  # each vendor's driver raises its own
        return f"triton finds no driver: {str(error).splitlines()[0]}"
    return None if target.backend in ("cuda", "hip", "xpu") else f"triton drives {target.backend}, not {kind}"
