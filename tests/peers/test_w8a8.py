"""W8A8 and LLM.int8(): what compressed-tensors, through transformers, and bitsandbytes compute, beside us."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fewbits
from fewbits import codecs, containers
from fewbits.calibration.sources import Calibration
from fewbits.qtensor import QTensor
from fewbits.runtime.dispatch import choose

pytestmark = pytest.mark.peer

CPU = torch.device("cpu")
# their layer's output on `x`, and the whole model's logits
SEEN = """
def dump(model, path):
    from safetensors.torch import save_file
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits  # first: it decompresses the layers
        x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(3))
        save_file({"x": x, "y": model.model.layers[0].self_attn.q_proj(x), "logits": logits}, path)
"""
LOAD = "import sys, json, torch\nfrom transformers import AutoModelForCausalLM\n" + SEEN + """
for source in json.loads(sys.argv[1]):
    dump(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), source + ".values")
"""
MAKE = "import sys, json, torch\nfrom transformers import AutoModelForCausalLM\n" + SEEN + """
from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
for target, acts in json.loads(sys.argv[2]).items():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    apply_quantization_config(model, QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": acts}},
        ignore=["lm_head"], quantization_status="frozen"))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(module.weight.abs().amax(1, keepdim=True) / 127.5)
            if hasattr(module, "input_scale"):
                module.input_scale.data.fill_(0.02)
    dump(model, target + ".values")
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(target)
"""
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
LAYER = TOKEN | {"strategy": "tensor", "dynamic": False}
BNB = """
import sys, json, torch, bitsandbytes as bnb
from safetensors.torch import load_file, save_file
given, found = load_file(sys.argv[1]), {}
for threshold in json.loads(sys.argv[2]):
    layer = bnb.nn.Linear8bitLt(given["w"].shape[1], len(given["w"]), bias=True, has_fp16_weights=False,
                                threshold=threshold)
    layer.weight = bnb.nn.Int8Params(given["w"].half(), requires_grad=False, has_fp16_weights=False)
    layer.bias.data = given["bias"]
    layer = layer.to("cpu").eval()
    with torch.no_grad():
        found[f"y{threshold}"] = layer(given["x"].clone())
    found["codes"], found["absmax"] = layer.state.CB, layer.state.SCB
save_file(found, sys.argv[3])
"""


def run(python: str, script: str, *args: object) -> None:
    done = subprocess.run([python, "-c", script, *map(str, args)], capture_output=True, text=True,
                          env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]


def agrees(path: Path) -> None:
    theirs, net = safetensors.torch.load_file(f"{path}.values"), fewbits.load(path)
    with torch.no_grad():
        layer, logits = net.model.layers[0].self_attn.q_proj(theirs["x"]), net(torch.arange(8)[None]).logits
    assert net.model.layers[0].self_attn.q_proj.prepared.codec.family == "w8a8"
    torch.testing.assert_close(layer, theirs["y"], rtol=1e-5, atol=1e-5)
    # an activation between two codes may fall to the other one: float32 has other last digits there
    assert (logits - theirs["logits"]).norm() / logits.norm() < 2e-3


def test_they_compute_what_we_do_on_our_files(peer, little_llama, tmp_path):
    tiny = little_llama(tmp_path / "tiny", 192)
    text = Calibration([{"input_ids": torch.arange(i, i + 40)[None]} for i in (0, 20, 50)], "tokens")
    paths = [fewbits.quantize(tiny, tmp_path / kind, kind, calibration=text, solver="search").path
             for kind in ("w8a8-sf32", "w8a8-static-sf32")]
    run(peer("compressed"), LOAD, json.dumps(list(map(str, paths))))
    for path in paths:
        agrees(path)


def test_we_compute_what_they_do_on_theirs(peer, little_llama, tmp_path):
    jobs = {str(tmp_path / "token"): TOKEN, str(tmp_path / "layer"): LAYER}
    run(peer("compressed"), MAKE, little_llama(tmp_path / "tiny", 192), json.dumps(jobs))
    for path, codec in zip(map(Path, jobs), ("w8a8-sf32", "w8a8-static-sf32"), strict=True):
        found = containers.open(path)
        assert found.entries["model.layers.0.self_attn.q_proj.weight"].codec == codecs.get(codec)
        agrees(path)


def test_llm_int8_beside_bitsandbytes(peer, tmp_path):
    """Columns of outliers are outliers in every row here: bitsandbytes lets the rest of such a column count in the
    scale of the others, which the paper does not."""
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(11, 96, generator=draw), torch.randn(40, 96, generator=draw) / 8
    x[:, [4, 50]] = x[:, [4, 50]].sign() * (8 + x[:, [4, 50]].abs())
    given = {"x": x.half().float(), "w": w.half(), "bias": torch.randn(40, generator=draw)}
    safetensors.torch.save_file(given, tmp_path / "given")
    thresholds = [0.0, 6.0, 9.5, 100.0]
    run(peer("bnb"), BNB, tmp_path / "given", json.dumps(thresholds), tmp_path / "found")
    found = safetensors.torch.load_file(tmp_path / "found")
    q = QTensor(codecs.get("int8"), (40, 96), {"codes": found["codes"], "absmax": found["absmax"][:, None]})
    exact = given["x"].double() @ q.dequantize().double().T + given["bias"].double()
    for threshold in thresholds:
        theirs = found[f"y{threshold}"].double()
        for name in ("rowwise", "native"):
            prepared = choose(q, CPU, name).prepare(q, torch.float32)
            vars(prepared)["outliers"] = threshold
            ours = prepared.matmul(given["x"], given["bias"]).double()
            if name == "rowwise" and threshold != 9.5:  # where columns are outliers in some rows only
                torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
            assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm(), (name, threshold)
