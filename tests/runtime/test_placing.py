"""Models on a GPU, or shared out between devices: where everything lies, that it computes the same, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fewbits
from fewbits import codecs
from fewbits.errors import FewbitsError
from fewbits.runtime.dispatch import choose
from fewbits.runtime.linear import QEmbedding, packed
from fewbits.runtime.placing import SHARE, Placing
from fewbits.solvers import solve
from tests import devices

IDS = torch.arange(3, 60)[None]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["int4-g32", "Q8_0"])
def source(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized; in GGUF the embeddings too, to which the head is tied."""
    out = tmp_path_factory.mktemp("m") / ("m.gguf" if request.param == "Q8_0" else "m")
    return fewbits.quantize(tiny, out, request.param, calibration="none", device="cpu").path


@pytest.fixture(scope="module")
def want(source: Path) -> torch.Tensor:
    return logits(fewbits.load(source, kernel="decode"))


def logits(net: Any) -> torch.Tensor:
    with torch.inference_mode():
        return net(input_ids=IDS.to(net.device)).logits.float().cpu()


def places(net: nn.Module) -> dict[str, str]:
    return {n: t.device.type for n, t in [*net.named_parameters(), *net.named_buffers()]}


def test_all_on_the_gpu(source: Path, want: torch.Tensor) -> None:
    with devices.found() as device:
        net = fewbits.load(source, device="cuda", dtype=torch.float32)
        assert set(places(net).values()) == {"cuda"} and net.device == device
        torch.testing.assert_close(logits(net), want, rtol=1e-4, atol=1e-4)
        assert fewbits.load(source, device="auto").dtype == torch.bfloat16
    assert fewbits.load(source).dtype == torch.float32


def test_moved(source: Path, want: torch.Tensor) -> None:
    """Layers are prepared anew where they go, what they share is shared again."""
    with devices.found():
        net: Any = fewbits.load(source, kernel="decode")
        net.model.layers[0].mlp.up_proj.show(torch.float32)
        net.to("cuda")
        assert set(places(net).values()) == {"cuda"}
        torch.testing.assert_close(logits(net), want, rtol=1e-4, atol=1e-4)
        net.to("cpu")
        assert set(places(net).values()) == {"cpu"}
        assert net.model.layers[0].mlp.up_proj.weight.numel() == 0, "shows its type still"
    embedding, head = net.get_input_embeddings(), net.lm_head
    assert isinstance(embedding, QEmbedding) == (source.suffix == ".gguf")
    if isinstance(embedding, QEmbedding):
        assert head.prepared is embedding.prepared
    far = (logits(net) - want).norm() / want.norm()
    assert 0 < far < 0.05, "the kernel of CPUs rounds activations"


def test_other_types_leave_packed_weights_alone() -> None:
    q = solve(torch.randn(24, 96), codecs.get("int8"))
    prepared = choose(q, CPU).prepare(q, torch.float32)
    vars(prepared)["outliers"] = 3.0
    layer = packed(prepared, nn.Linear(96, 24))
    layer.half()
    assert layer.prepared is prepared and layer.bias is not None and layer.bias.dtype == torch.float16
    with pytest.raises(FewbitsError, match="meta"):
        layer.to("meta")
    with devices.gpu() as device:
        layer.to(device)
        assert vars(layer.prepared)["outliers"] == 3.0 and layer.weight.device == device


@pytest.mark.parametrize("device_map,here", [
    ({"": "cuda", "model.layers.1": "cpu"}, {"model.layers.1."}),
    ({"": "cpu", "model.layers": 0}, {"model.embed", "model.norm", "model.rotary", "lm_head"}),
    ({"": 0, "lm_head": "cpu"}, {"lm_head"}),
    ("auto", set()), ("cuda:0", set()),
])
def test_shared_out(device_map: Any, here: set[str], source: Path, want: torch.Tensor) -> None:
    with devices.found():
        net = fewbits.load(source, device_map=device_map, dtype=torch.float32, kernel="decode")
        found = {name for name, kind in places(net).items() if kind == "cpu"}
        assert found == {name for name in places(net) if name.startswith(tuple(here))}
        torch.testing.assert_close(logits(net), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("manner", ["auto", "balanced", "sequential"])
def test_what_the_gpu_has_no_room_for_stays(manner: str, tmp_path: Path) -> None:
    """By packed sizes: in floats not even one block would go there."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=6,
                                      num_attention_heads=4, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    block = 65536 * (4.5 / 8) + 2 * 64 * 4
    with devices.found(int((64 * 64 * 4 + 4.1 * block) / SHARE)):
        net = fewbits.load(tmp_path, recipe="int4-g32", device_map=manner, dtype=torch.float32, kernel="decode")
        kinds = [{kind for name, kind in places(net).items() if f".layers.{i}." in name} for i in range(6)]
        assert kinds == 3 * [{"cuda"}] + 3 * [{"cpu"}], "room for one block more is kept free"
        assert bool(logits(net).isfinite().all())


def test_too_little_memory_says_what_would_fit(tiny: Path, source: Path) -> None:
    with devices.found(free=100_000), pytest.raises(FewbitsError, match=r"cuda:0: 0.0 GB are needed .* are free"):
        fewbits.load(source, device="cuda")
    free = 200_000_000
    with devices.found(free), pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.loading.short", lambda placed, sizes: (torch.device("cuda", 0), 2 * free, free))
        with pytest.raises(FewbitsError) as error:
            fewbits.load(tiny, device="cuda")
    assert str(error.value.hint).startswith("int8 (0.1 GB), ") and "would fit" in str(error.value.hint)


def test_nowhere_enough(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with devices.found(free=1000):
        monkeypatch.setattr("fewbits.runtime.placing.free_bytes", lambda device: 1000)
        with pytest.raises(FewbitsError, match="are needed for the weights, .* are free on all devices together"):
            fewbits.load(source, device_map="auto")


@pytest.mark.parametrize("device_map,message", [
    ({"": "cpu", "model.laers": 0}, "LlamaForCausalLM has no part 'model.laers'"),
    ({"model.layers": 0}, "says nothing of model.embed_tokens.weight"),
    ({"": "cpu", "model.layers.1.mlp": 0}, "splits model.layers.1, a LlamaDecoderLayer"),
    ({"": "disk"}, "not offloaded to disk"),
    ({"": 7}, "cuda:7: there are 1"),
    ("warp", "unknown device 'warp'"),
])
def test_maps_that_cannot_be(device_map: Any, message: str, source: Path) -> None:
    with devices.found(), pytest.raises(FewbitsError, match=message):
        fewbits.load(source, device_map=device_map)


def test_one_of_both(source: Path) -> None:
    with pytest.raises(FewbitsError, match="device cpu and device_map auto: one of them"):
        fewbits.load(source, device="cpu", device_map="auto")


def test_longest_beginning() -> None:
    placed = Placing({"": CPU, "model.layers.1": devices.GPU})
    assert placed.of("model.layers.1.mlp.up_proj.weight") == devices.GPU
    assert placed.of("model.layers.10.mlp.up_proj.weight") == placed.of("lm_head") == CPU
