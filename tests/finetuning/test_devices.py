"""A step of training on a GPU: adapters lie where the packed weights do, gradients are those of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewbits
from fewbits.errors import FewbitsError
from fewbits.finetuning.loop import trainable_on
from tests import devices

pytest.importorskip("peft")


def step(source: Path, device: torch.device) -> tuple[float, list[torch.Tensor]]:
    from fewbits.finetuning.adapters import Lora, attach
    from fewbits.finetuning.loss import CausalLoss

    torch.manual_seed(0)
    net = attach(fewbits.load(source, device=device, dtype=torch.float32, kernel="decode"), Lora(), None, "base")
    assert {p.device for p in net.parameters()} == {device}
    ids = torch.arange(3, 60)[None].to(device)
    loss = CausalLoss()(net, {"input_ids": ids, "labels": ids})
    loss.backward()
    return loss.item(), [p.grad.cpu() for p in net.parameters() if p.grad is not None]


def test_a_step(tiny: Path, tmp_path: Path) -> None:
    source = fewbits.quantize(tiny, tmp_path / "m.gguf", "Q8_0").path
    with devices.found() as device:
        there, slopes = step(source, device)
    here, want = step(source, devices.CPU)
    assert there == pytest.approx(here, rel=1e-5)
    torch.testing.assert_close(slopes, want, rtol=1e-3, atol=1e-5)


def test_only_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with devices.found() as device:
        assert trainable_on(None) == device
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(FewbitsError, match="cuda:1: fine-tuning takes the first GPU") as error:
            trainable_on("cuda:1")
    assert "CUDA_VISIBLE_DEVICES=1" in (error.value.hint or "")
