"""Which kernel is taken, and what is said of it."""

from __future__ import annotations

import logging

import pytest
import torch

from fewbits import codecs
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.runtime import dispatch
from fewbits.runtime.reference import Decode, Decoded, Kernel, Prepared
from tests.devices import CPU, GPU


class Quick(Kernel):
    """Takes 4-bit codes on GPUs."""

    name = "quick"

    def supports(self, q: QTensor, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"not on {device.type}"
        return None if q.codec.integer_bits == 4 else f"codes of {q.codec.integer_bits} bits"

    def prepare(self, q: QTensor, dtype: torch.dtype) -> Prepared:
        return Decode().prepare(q, dtype)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", (Quick(), Decoded(), Decode()))
    dispatch._log.cache_clear()


def weight(name: str, rows: int = 4) -> QTensor:
    return QTensor(codecs.get(name), (rows, 64), {})


def test_fallbacks_are_logged_once_with_their_reasons(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fewbits"):
        for rows in (4, 5):
            assert dispatch.choose(weight("int4-g32", rows), GPU).name == "quick"
            assert dispatch.choose(weight("int8", rows), GPU).name == "decoded"
            assert dispatch.choose(weight("int3-g64", rows), GPU, without=("decoded",)).name == "decode"
            assert dispatch.choose(weight("int4-g32", rows), CPU).name == "decoded"
    assert [r.getMessage() for r in caplog.records] == [
        "int8 on cuda is computed by the kernel 'decoded', others cannot: quick: codes of 8 bits",
        "int3-g64 on cuda is computed by the kernel 'decode', others cannot: quick: codes of 3 bits; decoded: ruled "
        "out",
    ]


def test_a_kernel_asked_for_is_taken_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    assert dispatch.choose(weight("int8"), GPU, "decode").name == "decode"
    with pytest.raises(FewbitsError, match=r"no kernel computes int8 \[4, 64\] on cuda:0: quick: codes of 8 bits"):
        dispatch.choose(weight("int8"), GPU, "quick")
    assert not caplog.records
