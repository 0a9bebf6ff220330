"""GPTQModel's AWQ layers, by themselves and through transformers, read what we write; we read what they pack."""

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
from fewbits.containers.awq import Awq
from fewbits.containers.directory import TransformersDirectory, module_of
from fewbits.qtensor import QTensor
from tests.peers.directories import agrees

pytestmark = pytest.mark.peer

LOAD = """
import sys, json, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AwqConfig
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
for source, target in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(source, device_map={"": "cpu"}, dtype=torch.float16,
                                                 quantization_config=AwqConfig(backend="torch_awq"))
    found = {n + ".weight": m._dequantize_weight_for_inference(torch.zeros(1, m.in_features), dtype=torch.float16)
             .t().contiguous() for n, m in model.named_modules() if isinstance(m, AwqTorchLinear)}
    with torch.no_grad():
        found["logits"] = model(torch.arange(8)[None]).logits
    save_file(found, target)
"""
PACK = """
import sys, json, torch
from safetensors.torch import save_file
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
for i, (group, symmetric, rows, columns) in enumerate(json.loads(sys.argv[2])):
    g = torch.Generator().manual_seed(i)
    width = columns if group == -1 else group
    m = AwqTorchLinear(bits=4, group_size=group, sym=symmetric, desc_act=False, in_features=columns, out_features=rows,
                       register_buffers=True)
    scales = (torch.rand(rows, columns // width, generator=g) + 0.1).half().float()
    zeros = torch.full(scales.shape, 8) if symmetric else torch.randint(0, 16, scales.shape, generator=g)
    codes = torch.randint(0, 16, (rows, columns), generator=g)
    g_idx = torch.arange(columns) // width
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = scales[:, g_idx] * (codes - zeros[:, g_idx])
    m.pack(linear, scales, zeros.float())
    m.scales = m.scales.half()
    meant = m._dequantize_weight_for_inference(torch.zeros(1, columns), dtype=torch.float16).t().contiguous()
    found = {"x." + k: getattr(m, k).clone().contiguous() for k in ("qweight", "qzeros", "scales")}
    save_file(found | {"meant": meant}, f"{sys.argv[1]}/{i}.safetensors")
"""


def run(python: str, script: str, *args: object) -> None:
    done = subprocess.run([python, "-c", script, *map(str, args)], capture_output=True, text=True,
                          env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]


def quantized(path, kind, keep=()) -> Checkpoint:
    checkpoint = TransformersDirectory().read(path)
    codec = codecs.get(kind)
    for name, entry in checkpoint.entries.items():
        module = module_of(name) or ""
        if "_proj" in module and not module.endswith(keep):
            w = entry.load().dequantize()
            params = fit_units(w, codec, None, None)
            tensor = QTensor.pack(codec, entry.shape, encode_units(w, codec, params), params)
            checkpoint.entries[name] = Entry(name, entry.shape, codec, lambda tensor=tensor: tensor)
    return checkpoint


def test_they_read_ours(peer, little_llama, tmp_path):
    """Through transformers; one process for all, since importing takes longer than reading."""
    tiny = little_llama(tmp_path / "tiny", 192)
    jobs = {"int4-g32-asym": (), "int4-g64": (), "int4-g16-asym": ("v_proj", "up_proj")}
    todo = []
    for kind, keep in jobs.items():
        base.write(Awq(), tmp_path / kind, quantized(tiny, kind, keep))
        todo.append((str(tmp_path / kind), str(tmp_path / f"{kind}.values")))
    run(peer("gptq"), LOAD, json.dumps(todo))
    for kind, keep in jobs.items():
        agrees(tmp_path / kind, 7 - len(keep))


def test_we_read_theirs(peer, tmp_path):
    cases = [(group, symmetric, rows, columns) for group, rows, columns in ((-1, 32, 64), (32, 96, 128), (64, 8, 64))
             for symmetric in (True, False)]
    run(peer("gptq"), PACK, tmp_path, json.dumps(cases))
    for i, (group, symmetric, rows, columns) in enumerate(cases):
        path = tmp_path / f"case{i}"
        path.mkdir()
        files = safetensors.torch.load_file(tmp_path / f"{i}.safetensors")
        meant = files.pop("meant")
        safetensors.torch.save_file(files, path / "model.safetensors")
        settings = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group, "zero_point": True}
        (path / "config.json").write_text(json.dumps({"quantization_config": settings}))
        entry = containers.open(path).entries["x.weight"]
        assert entry.shape == (rows, columns) and entry.codec.symmetric == symmetric
        assert torch.equal(entry.load().dequantize(torch.float16), meant), cases[i]
        base.write(Awq(), tmp_path / f"again{i}", containers.open(path))
        again = safetensors.torch.load_file(tmp_path / f"again{i}" / "model.safetensors")
        assert again.keys() == files.keys() and all(torch.equal(again[k], files[k]) for k in files), cases[i]
