"""What the tests of kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fewbits import _native


@pytest.fixture(params=_native.usable())
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every set of instructions that this machine has kernels for, one after the other."""
    before = _native.current()
    _native.use(request.param)
    yield request.param
    _native.use(before)
