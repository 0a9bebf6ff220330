"""Which of the compiled sets of native kernels is in use: the best that the CPU can run, unless another is asked for.

The environment variable `FEWBITS_CPU` names one, for tests and comparisons; it is obeyed at the first call.
"""

from __future__ import annotations

import os
import sys

from fewbits import _native
from fewbits.errors import FewbitsError
from fewbits.lazy import torch

VARIABLE = "FEWBITS_CPU"
_asked = [name for name in [os.environ.get(VARIABLE)] if name]  # until it was obeyed


def use(name: str) -> None:
    """Take the kernels called `name`: "portable", "avx2", "avx512" or "neon".

    Raises:
        FewbitsError: there are none of that name, or this CPU lacks instructions that they need.
    """
    if name not in _native.usable():
        raise FewbitsError(f"no kernels called {name!r} run on this CPU", "one of: " + ", ".join(_native.usable()))
    _native.use(name)
    _asked.clear()


def current() -> str:
    """The kernels in use.

    Raises:
        FewbitsError: the environment names some that don't run here.
    """
    if _asked:
        use(_asked[0])
    return _native.current()


def threads() -> int:
    """Threads of a native call, within what is allowed; it will run on `current()` kernels.

    As many as torch uses; before anything imported it, what OMP_NUM_THREADS says, or one for every CPU.
    """
    current()
    wanted = torch.get_num_threads() if "torch" in sys.modules else _without_torch()
    return max(1, min(wanted, _native.MOST_THREADS))


def _without_torch() -> int:
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if said.isdecimal() and int(said):
        return int(said)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
