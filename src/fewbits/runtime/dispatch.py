"""Which kernel computes with a tensor: the first of an ordered list that supports it."""

from __future__ import annotations

import torch

from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.runtime.cpu import Cpu
from fewbits.runtime.floats import Floats
from fewbits.runtime.reference import Decode, Decoded, Kernel
from fewbits.runtime.rowwise import Rowwise
from fewbits.runtime.triton.kernel import Triton

KERNELS: tuple[Kernel, ...] = (Cpu(), Triton(), Rowwise(), Floats(), Decoded(), Decode())


def choose(q: QTensor, device: torch.device, only: str | None = None, without: tuple[str, ...] = ()) -> Kernel:
    """The first kernel that supports `q` on `device`; `only` names the one to take, `without` those not to take.

    Raises:
        FewbitsError: none does; the message lists every kernel and its reason.
    """
    reasons = []
    for kernel in KERNELS:
        asked = kernel.name not in without and only in (None, kernel.name)
        reason = kernel.supports(q, device) if asked else f"not asked for (only {only})" if only else "ruled out"
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise FewbitsError(f"no kernel computes {q.codec.name} {list(q.shape)} on {device}: " + "; ".join(reasons),
                       "kernels: " + ", ".join(k.name for k in KERNELS))
