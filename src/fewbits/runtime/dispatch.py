"""Which kernel computes with a tensor: the first of an ordered list that supports it."""

from __future__ import annotations

import logging
from functools import cache
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from fewbits.checkpoint import Entry
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.recipe import Choice
from fewbits.runtime.cpu import OUTLIER, Cpu
from fewbits.runtime.floats import Floats
from fewbits.runtime.reference import Decode, Decoded, Kernel, Prepared
from fewbits.runtime.rowwise import Rowwise
from fewbits.runtime.triton.kernel import Triton

KERNELS: tuple[Kernel, ...] = (Cpu(), Triton(), Rowwise(), Floats(), Decoded(), Decode())
LOG = logging.getLogger("fewbits")


def choose(q: QTensor, device: torch.device, only: str | None = None, without: tuple[str, ...] = ()) -> Kernel:
    """The first kernel that supports `q` on `device`; `only` names the one to take, `without` those not to take.

    Where that is a fallback on a GPU, it is logged, once for each codec and its reasons.

    Raises:
        FewbitsError: none does; the message lists every kernel and its reason.
    """
    kernel, reasons = _first(q, device, only, without)
    if kernel.fallback and only is None and device.type != "cpu":
        _log(q.codec.name, device.type, reasons, kernel.name)
    return kernel


def _first(q: QTensor, device: torch.device, only: str | None, without: tuple[str, ...]) -> tuple[Kernel, str]:
    """The kernel to take, and why none of those before it."""
    reasons: list[str] = []
    for kernel in KERNELS:
        asked = kernel.name not in without and only in (None, kernel.name)
        reason = kernel.supports(q, device) if asked else f"not asked for (only {only})" if only else "ruled out"
        if reason is None and only is None and not kernel.offers(device):
            reason = "only where it is asked for"
        if reason is None:
            return kernel, "; ".join(reasons)
        reasons.append(f"{kernel.name}: {reason}")
    raise FewbitsError(f"no kernel computes {q.codec.name} {list(q.shape)} on {device}: " + "; ".join(reasons),
                       "kernels: " + ", ".join(k.name for k in KERNELS))


@cache
def _log(codec: str, kind: str, reasons: str, taken: str) -> None:
    LOG.warning("%s on %s is computed by the kernel %r, others cannot: %s", codec, kind, taken, reasons)


def prepare(q: QTensor, device: torch.device, dtype: torch.dtype, only: str | None = None,
            without: tuple[str, ...] = (), outliers: float | None = OUTLIER) -> Prepared:
    """A weight ready to multiply on `device`, by the first kernel that supports it."""
    prepared = choose(q, device, only, without).prepare(q.to(device), dtype)
    if q.codec.family == "int8":
        vars(prepared)["outliers"] = outliers or None
    return prepared


def prepared_bytes(weight: Entry | Choice, device: torch.device, dtype: torch.dtype, only: str | None = None) -> int:
    """Memory that a weight, of which the codec and the shape are known, takes there at least."""
    kernel, _ = _first(QTensor(weight.codec, weight.shape, {}), device, only, () if only else ("decoded",))
    return kernel.nbytes(weight.codec, weight.shape, dtype)


_moved: WeakKeyDictionary[Prepared, WeakValueDictionary[torch.device, Prepared]] = WeakKeyDictionary()


def moved(prepared: Prepared, device: torch.device, only: str | None = None) -> Prepared:
    """The weight prepared anew for another device; once for all layers that share it."""
    if next(iter(prepared.planes.values())).device == device:
        return prepared
    found = _moved.setdefault(prepared, WeakValueDictionary())
    made = found.get(device)
    if made is None:
        made = prepare(prepared.q, device, prepared.dtype, only, outliers=vars(prepared).get("outliers", OUTLIER))
        found[device] = made
    return made
