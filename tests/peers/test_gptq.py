"""GPTQModel, by itself and through transformers, reads what we write; we read what it packs. Values are equal."""

from __future__ import annotations

import json
import subprocess

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from fewbits import codecs
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import encode_units, fit_units
from fewbits.containers import base
from fewbits.containers.directory import TransformersDirectory, module_of
from fewbits.containers.gptq import Gptq
from fewbits.qtensor import QTensor

pytestmark = pytest.mark.peer

LOAD = """
import sys, json, torch
from safetensors.torch import save_file
from gptqmodel import GPTQModel, BACKEND
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from transformers import AutoModelForCausalLM, GPTQConfig
for way, source, target in json.loads(sys.argv[1]):
    if way == "gptqmodel":
        model = GPTQModel.load(source, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    else:
        model = AutoModelForCausalLM.from_pretrained(source, device_map={"": "cpu"}, dtype=torch.float16,
                                                     quantization_config=GPTQConfig(bits=4, backend="gptq_torch"))
    found = {n + ".weight": m.dequantize_weight().t().contiguous() for n, m in model.named_modules()
             if isinstance(m, BaseQuantLinear)}
    save_file(found, target)
    if source.endswith("int4-g64"):  # its forward pass compiles for seconds
        with torch.no_grad():
            assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
"""
PACK = """
import sys, json, torch
from safetensors.torch import save_file
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
for i, (bits, group, symmetric, rows, columns, act_order, version) in enumerate(json.loads(sys.argv[2])):
    g = torch.Generator().manual_seed(i)
    width = columns if group == -1 else group
    groups = columns // width
    m = TorchLinear(bits=bits, group_size=group, sym=symmetric, desc_act=act_order, in_features=columns,
                    out_features=rows, register_buffers=True)
    scales = (torch.rand(rows, groups, generator=g) + 0.1).half().float()
    zeros = torch.full((rows, groups), 1 << (bits - 1)) if symmetric else \\
        torch.randint(1, 1 << bits, (rows, groups), generator=g)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=g)
    g_idx = torch.arange(columns) // width
    if act_order:
        g_idx = g_idx[torch.randperm(columns, generator=g)]
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = scales[:, g_idx] * (codes - zeros[:, g_idx])
    m.pack_original(linear, scales, zeros.float(), g_idx.int())
    m.post_init()
    meant = m.dequantize_weight().t().contiguous()
    m.qzero_format(2)
    if version == "gptq":
        convert_gptq_v2_to_v1_format_module(m, QuantizeConfig(bits=bits, group_size=group, sym=symmetric))
    found = {"x." + k: getattr(m, k).clone().contiguous() for k in ("qweight", "qzeros", "scales", "g_idx")}
    save_file(found | {"meant": meant}, f"{sys.argv[1]}/{i}.safetensors")
"""


def run(python: str, script: str, *args: object) -> None:
    done = subprocess.run([python, "-c", script, *map(str, args)], capture_output=True, text=True,
                          env={"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, little_llama):
    """A Llama of one block in which every width divides as the peer wants it."""
    path = little_llama(tmp_path_factory.mktemp("models") / "tiny", 192)
    words = {f"w{i}": i for i in range(96)}  # GPTQModel wants a tokenizer
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "eos_token": "w1", "pad_token": "w2"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def nearest(w: torch.Tensor, codec, order=None) -> QTensor:
    flat = w.float() if order is None else w.float()[:, order]
    params = fit_units(flat, codec, None, codec.begin(flat, None))
    found = QTensor.pack(codec, tuple(w.shape), encode_units(flat, codec, params), params)
    return QTensor(codec, found.shape, found.planes, order)


def quantized(path, kind, others=None, act_order=False) -> Checkpoint:
    checkpoint = TransformersDirectory().read(path)
    for name, entry in checkpoint.entries.items():
        module = module_of(name) or ""
        chosen = next((k for part, k in (others or {}).items() if part in module), kind)
        if "_proj" in module and chosen != "keep":
            w = entry.load().dequantize()
            order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(1)) if act_order else None
            tensor = nearest(w, codecs.get(chosen), order)
            checkpoint.entries[name] = Entry(name, entry.shape, tensor.codec, lambda tensor=tensor: tensor)
    return checkpoint


KINDS = ["int2-g16", "int3-g32", "int4-g64", "int8-g32", "int4-row", "int2-g32-asym", "int3-g64-asym", "int4-g32-asym",
         "int8-row-asym"]
MIXED = {"v_proj": "int8-g16", "o_proj": "int2-g32", "down_proj": "keep"}


def test_they_read_ours(peer, tiny, tmp_path):
    """One process for all: importing takes longer than reading."""
    jobs = []
    for way in ("gptqmodel", "transformers"):
        for kind in KINDS:
            jobs.append((way, kind, Gptq(), quantized(tiny, kind)))
        jobs.append((way, "act-order", Gptq(), quantized(tiny, "int4-g16", act_order=True)))
    jobs.append(("transformers", "int4-g32-asym-v1", Gptq("gptq"), quantized(tiny, "int4-g32-asym")))
    jobs.append(("transformers", "int4-g32-v2", Gptq("gptq_v2"), quantized(tiny, "int4-g32")))
    jobs.append(("gptqmodel", "mixed", Gptq(), quantized(tiny, "int4-g32", MIXED)))
    todo = []
    for way, kind, container, checkpoint in jobs:
        base.write(container, tmp_path / f"{way}-{kind}", checkpoint)
        todo.append((way, str(tmp_path / f"{way}-{kind}"), str(tmp_path / f"{way}-{kind}.values")))
    run(peer("gptq"), LOAD, json.dumps(todo))
    for way, kind, _, checkpoint in jobs:
        theirs = safetensors.torch.load_file(tmp_path / f"{way}-{kind}.values")
        assert len(theirs) == (6 if kind == "mixed" else 7)
        for name, meant in theirs.items():
            ours = checkpoint.entries[name].load().dequantize(torch.float16)
            assert torch.equal(ours, meant.half()), (way, kind, name)


def test_we_read_theirs(peer, tmp_path):
    cases = [(bits, group, symmetric, rows, columns, act_order, version)
             for bits in (2, 3, 4, 8) for group, rows, columns in ((-1, 32, 64), (32, 96, 128), (64, 32, 64))
             for symmetric in (True, False) for act_order in (False, True) for version in ("gptq", "gptq_v2")
             if not (act_order and group == -1)]
    run(peer("gptq"), PACK, tmp_path, json.dumps(cases))
    for i, (bits, group, symmetric, rows, columns, act_order, version) in enumerate(cases):
        path = tmp_path / f"case{i}"
        path.mkdir()
        files = safetensors.torch.load_file(tmp_path / f"{i}.safetensors")
        meant = files.pop("meant")
        safetensors.torch.save_file(files, path / "model.safetensors")
        settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": version,
                    "sym": symmetric, "desc_act": act_order}
        (path / "config.json").write_text(json.dumps({"quantization_config": settings}))
        entry = Gptq().read(path).entries["x.weight"]
        assert entry.shape == (rows, columns) and entry.codec.symmetric == symmetric
        assert torch.equal(entry.load().dequantize(torch.float16), meant.half()), cases[i]
        base.write(Gptq(version), tmp_path / f"again{i}", Gptq().read(path))
        again = safetensors.torch.load_file(tmp_path / f"again{i}" / "model.safetensors")
        assert again.keys() == files.keys() and all(torch.equal(again[k], files[k]) for k in files), cases[i]
