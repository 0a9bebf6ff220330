"""compressed-tensors, by itself and through transformers, reads what we write; we read what it compresses."""

from __future__ import annotations

import json
import subprocess

import pytest
import safetensors.torch
import torch

from fewbits import codecs, containers
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import encode_units, fit_units
from fewbits.containers import base
from fewbits.containers.compressed import CompressedTensors
from fewbits.containers.directory import TransformersDirectory, module_of
from fewbits.qtensor import QTensor
from tests.peers.directories import agrees, packed

pytestmark = pytest.mark.peer

# without `dequantize`, transformers 5.23 expects zero points that are not packed, though the package packs them
LOAD = """
import sys, json, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from compressed_tensors.compressors import decompress_module
for source, dequantize, target in json.loads(sys.argv[1]):
    settings = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16, **settings)
    found = {}
    with torch.no_grad():
        found["logits"] = model(torch.arange(8)[None]).logits
    for name, module in model.named_modules():
        if "_proj" in name and (dequantize or hasattr(module, "quantization_scheme")):
            if hasattr(module, "weight_packed"):
                decompress_module(module)
            found[name + ".weight"] = module.weight.detach().contiguous()
    save_file(found, target)
"""
PACK = """
import sys, json, torch
from safetensors.torch import save_file
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
for i, (form, bits, group, symmetric, rows, columns) in enumerate(json.loads(sys.argv[2])):
    g = torch.Generator().manual_seed(i)
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, group_size=group,
                            strategy="channel" if group == -1 else "group")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    groups = 1 if group == -1 else columns // group
    low = -(1 << bits - 1)
    state = {"weight": torch.randn(rows, columns, generator=g).half(),
             "weight_scale": (torch.rand(rows, groups, generator=g) / (1 << bits - 2) + 0.01).half(),
             "weight_zero_point": torch.zeros(rows, groups, dtype=torch.int8) if symmetric else
             torch.randint(low, -low, (rows, groups), generator=g).to(torch.int8)}
    compressor = BaseCompressor.get_value_from_registry(form)
    found = compressor.compress(state, scheme)
    meant = compressor.decompress(found, scheme)["weight"]
    found = {"x." + k: v.contiguous() for k, v in found.items()}
    save_file(found | {"meant": meant.contiguous()}, f"{sys.argv[1]}/{i}.safetensors")
    json.dump({"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": scheme.model_dump()}},
              open(f"{sys.argv[1]}/{i}.json", "w"))
"""


def run(python: str, script: str, *args: object) -> None:
    done = subprocess.run([python, "-c", script, *map(str, args)], capture_output=True, text=True,
                          env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]


def quantized(path, kind, others=None) -> Checkpoint:
    """Layers whose names end as `others` says get those codecs, or "keep"; everything else `kind`."""
    checkpoint = TransformersDirectory().read(path)
    for name, entry in checkpoint.entries.items():
        module = module_of(name) or ""
        chosen = next((k for part, k in (others or {}).items() if module.endswith(part)), kind)
        if "_proj" in module and chosen != "keep":
            codec = codecs.get(chosen)
            w = entry.load().dequantize()
            params = fit_units(w, codec, None, None)
            tensor = QTensor.pack(codec, entry.shape, encode_units(w, codec, params), params)
            checkpoint.entries[name] = Entry(name, entry.shape, codec, lambda tensor=tensor: tensor)
    return checkpoint


MIXED = {"v_proj": "int8-g16", "o_proj": "int2-g32", "gate_proj": "int8-row", "down_proj": "keep"}


def test_they_read_ours(peer, little_llama, tmp_path):
    """Through transformers; one process for all, since importing takes longer than reading."""
    tiny = little_llama(tmp_path / "tiny", 192)
    kinds = ("int4-g32", "int4-g64-asym", "int8-row", "int3-g16-asym", "int2-g32", "int8-row-asym")
    jobs = {kind: {} for kind in kinds}
    jobs["mixed"] = MIXED
    todo = []
    for kind, others in jobs.items():
        base.write(CompressedTensors(), tmp_path / kind,
                   quantized(tiny, "int4-g32" if kind == "mixed" else kind, others))
        todo.append((str(tmp_path / kind), kind.endswith("asym"), str(tmp_path / f"{kind}.values")))
    run(peer("compressed"), LOAD, json.dumps(todo))
    for kind in jobs:
        agrees(tmp_path / kind, 6 if kind == "mixed" else 7)


def test_we_read_theirs(peer, tmp_path):
    cases = [("pack-quantized", bits, group, symmetric, rows, columns) for bits in (2, 3, 4, 8)
             for group, rows, columns in ((-1, 37, 50), (32, 96, 128), (16, 37, 48)) for symmetric in (True, False)]
    cases += [("int-quantized", 8, -1, symmetric, 37, 50) for symmetric in (True, False)]
    run(peer("compressed"), PACK, tmp_path, json.dumps(cases))
    for i, (form, bits, _, symmetric, rows, columns) in enumerate(cases):
        entry, meant = packed(tmp_path, i)
        assert entry.shape == (rows, columns) and (entry.codec.bits, entry.codec.symmetric) == (bits, symmetric)
        assert torch.equal(entry.load().dequantize(torch.float16), meant), cases[i]
        base.write(CompressedTensors(), tmp_path / f"again{i}", containers.open(tmp_path / f"case{i}"))
        files = safetensors.torch.load_file(tmp_path / f"case{i}" / "model.safetensors")
        again = safetensors.torch.load_file(tmp_path / f"again{i}" / "model.safetensors")
        if form == "pack-quantized":
            assert again.keys() == files.keys() and all(torch.equal(again[k], files[k]) for k in files), cases[i]
