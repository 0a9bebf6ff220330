"""compressed-tensors reads the FP8 that we write, and we read what it compresses."""

from __future__ import annotations

import json
import subprocess

import pytest
import safetensors.torch
import torch

from fewbits import containers, load, quantize
from tests.peers.directories import packed

pytestmark = pytest.mark.peer

LOAD = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from compressed_tensors.compressors import decompress_module
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
found = {}
with torch.no_grad():
    found["logits"] = model(torch.arange(8)[None]).logits
for name, module in model.named_modules():
    if hasattr(module, "quantization_scheme"):
        if module.weight.dtype == torch.float8_e4m3fn:
            decompress_module(module)
        found[name + ".weight"] = module.weight.detach().float().contiguous()
save_file(found, sys.argv[2])
"""
PACK = """
import sys, json, torch
from safetensors.torch import save_file
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
for i, (strategy, dtype) in enumerate(json.loads(sys.argv[2])):
    g = torch.Generator().manual_seed(i)
    block = [16, 16] if strategy == "block" else None
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy, block_structure=block)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    shape = {"channel": (48, 1), "tensor": (1,), "block": (3, 2)}[strategy]
    dtype = getattr(torch, dtype)
    state = {"weight": torch.randn(48, 32, generator=g).to(dtype),
             "weight_scale": (torch.rand(shape, generator=g) * 0.01 + 1e-4).to(dtype)}
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    found = compressor.compress(state, scheme)
    meant = compressor.decompress(found, scheme)["weight"]
    found = {"x." + k: v.contiguous() for k, v in found.items()}
    save_file(found | {"meant": meant.contiguous()}, f"{sys.argv[1]}/{i}.safetensors")
    json.dump({"quant_method": "compressed-tensors", "format": "float-quantized",
               "config_groups": {"group_0": scheme.model_dump()}}, open(f"{sys.argv[1]}/{i}.json", "w"))
"""


def run(python: str, script: str, *args: object) -> None:
    done = subprocess.run([python, "-c", script, *map(str, args)], capture_output=True, text=True,
                          env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]


def test_they_read_ours(peer, tiny, tmp_path):
    quantize(tiny, tmp_path / "out", "fp8-e4m3")
    run(peer("compressed"), LOAD, tmp_path / "out", tmp_path / "values")
    theirs = safetensors.torch.load_file(tmp_path / "values")
    logits, ours = theirs.pop("logits"), containers.open(tmp_path / "out")
    assert len(theirs) == 14
    for name, meant in theirs.items():
        assert torch.equal(ours.entries[name].load().dequantize(), meant), name
    with torch.no_grad():
        mine = load(ours, kernel="decoded")(torch.arange(8)[None]).logits
    assert (mine - logits).pow(2).mean() / mine.pow(2).mean() < 1e-10


def test_we_read_theirs(peer, tmp_path):
    cases = [(strategy, dtype) for strategy in ("channel", "tensor", "block") for dtype in ("float32", "bfloat16")]
    run(peer("compressed"), PACK, tmp_path, json.dumps(cases))
    for i, (strategy, dtype) in enumerate(cases):
        entry, meant = packed(tmp_path, i)
        assert entry.codec.name == ("fp8-e4m3-b16" if strategy == "block" else "fp8-e4m3")
        # they multiply in the type of their scales: a product rounded once, as ours when it is rounded
        assert torch.equal(entry.load().dequantize(getattr(torch, dtype)), meant), cases[i]
