"""`from_pretrained` with a device_map: packed weights made or read on the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fewbits
from fewbits import FewbitsConfig
from fewbits.errors import FewbitsError
from fewbits.runtime.linear import QLinear
from tests import devices
from tests.hf.models import IDS, logits

HALF = {"": "cuda", "model.layers.1": "cpu"}


@pytest.fixture(scope="module")
def source(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("m") / "m"
    return fewbits.quantize(tiny, out, "nf4-b32", container="fewbits", calibration="none", device="cpu").path


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():  # it fills the memory of a real one
        monkeypatch.setattr(transformers.modeling_utils, "caching_allocator_warmup", lambda *arguments: None)


def pretrained(path: Path, device_map: Any, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, device_map=device_map, dtype=torch.float32,
                                                             **options).eval()


@pytest.mark.parametrize("device_map", ["cuda", {"": 0}, "auto"])
def test_on_the_gpu(device_map: Any, source: Path, tiny: Path) -> None:
    with devices.found() as device:
        for path, options in ((source, {}), (tiny, {"quantization_config": FewbitsConfig("nf4-b32")})):
            net = pretrained(path, device_map, **options)
            assert sum(isinstance(m, QLinear) for m in net.modules()) == 14
            if device_map == "auto" and not torch.cuda.is_available() and net.device.type == "cpu":
                continue  # accelerate looks for a GPU by itself
            assert {t.device for t in [*net.parameters(), *net.buffers()]} == {device}
            with torch.inference_mode():
                got = net(input_ids=IDS.to(device)).logits.cpu()
            if path == source:
                want = logits(fewbits.load(source, kernel="decode"))
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_sizes_are_those_of_packed_weights(source: Path) -> None:
    seen: dict[str, float] = {}
    from fewbits.hf.quantizer import FewbitsQuantizer

    real = FewbitsQuantizer.param_element_size
    with devices.found(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(FewbitsQuantizer, "param_element_size",
                      lambda self, model, name, param: seen.setdefault(name, real(self, model, name, param)))
        pretrained(source, "auto")
    assert seen["model.layers.0.mlp.up_proj.weight"] == 0.5 + 4 / 32 and seen["model.norm.weight"] == 4


@pytest.mark.parametrize("free,device_map", [(80 << 30, HALF), (190_000, "auto")])
def test_nothing_is_left_on_the_cpu_for_transformers_to_copy(free: int, device_map: Any, source: Path) -> None:
    with devices.found(free), pytest.raises(FewbitsError, match="Transformers would copy to a GPU") as error:
        pretrained(source, device_map)
    assert "fewbits.load" in (error.value.hint or "")
