"""Which of the compiled sets of native kernels is in use: the best that the CPU can run, unless another is asked for.

The environment variable `FEWBITS_CPU` names one, for tests and comparisons.
"""

from __future__ import annotations

import os

from fewbits import _native
from fewbits.errors import FewbitsError

VARIABLE = "FEWBITS_CPU"


def use(name: str) -> None:
    """Take the kernels called `name`: "portable", "avx2" or "avx512".

    Raises:
        FewbitsError: there are none of that name, or this CPU lacks instructions that they need.
    """
    if name not in _native.usable():
        raise FewbitsError(f"no kernels called {name!r} run on this CPU", "one of: " + ", ".join(_native.usable()))
    _native.use(name)


if os.environ.get(VARIABLE):
    use(os.environ[VARIABLE])
