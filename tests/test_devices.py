"""Devices by name, and the GPU of the tests."""

from __future__ import annotations

import pytest
import torch

from fewbits.devices import find, free_bytes
from fewbits.errors import FewbitsError
from tests import devices

alone = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_names() -> None:
    assert find("cpu") == torch.device("cpu")
    with devices.found(1234) as device:
        assert find() == find("auto") == find("cuda") == find("cuda:0") == find(device) == device
        assert free_bytes(device) == 1234
        with pytest.raises(FewbitsError, match="cuda:9: there are 1 cuda devices, numbered from 0"):
            find("cuda:9")
    with pytest.raises(FewbitsError, match="unknown device 'warp'"):
        find("warp")


@alone
def test_no_gpu() -> None:
    assert find() == torch.device("cpu")
    with pytest.raises(FewbitsError, match="no GPU: torch .* sees no cuda device") as error:
        find("cuda")
    assert "leave --device out" in (error.value.hint or "")


@alone
def test_the_pretended_gpu_refuses_what_a_gpu_does() -> None:
    here = torch.ones(3)
    with devices.gpu() as device:
        there = here.to(device)
        assert there.device == (there + 1).device == there[torch.tensor([0])].device == device
        assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2], "single numbers may come from the CPU"
        assert torch.empty(3).copy_(there).device.type == there.cpu().device.type == "cpu"
        layer = torch.nn.Linear(3, 2).to(device)
        assert layer(there).device == torch.zeros(2, device="cuda").device == device
        for wrong in (lambda: there + here, lambda: torch.cat([here, there]), lambda: layer(here),
                      lambda: here[there.long()], lambda: there.numpy()):
            with pytest.raises(devices.Mixed):
                wrong()
