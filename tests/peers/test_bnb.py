"""bitsandbytes and transformers read what we write, and we what they write, bit for bit."""

from __future__ import annotations

import json
import subprocess

import pytest
import safetensors.torch
import torch

from fewbits import codecs
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import encode_units, fit_units
from fewbits.containers import base
from fewbits.containers.bnb import BitsAndBytes
from fewbits.containers.directory import TransformersDirectory, module_of
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor

pytestmark = pytest.mark.peer

DUMP = """
def dump(model, path):
    import bitsandbytes as bnb
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from safetensors.torch import save_file
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, bnb.nn.Linear4bit):
            state = m.weight.quant_state
            plain = state.absmax
            if state.nested:
                plain = bnb.functional.dequantize_blockwise(plain, state.state2) + state.offset
            # not the CPU kernel: it takes other scales where a multiple of 32 columns is no multiple of the block
            found[name + ".weight"] = _dequantize_4bit_compute(
                m.weight.data.reshape(-1), plain, state.code, state.blocksize, state.shape, state.dtype)
        elif isinstance(m, bnb.nn.Linear8bitLt):
            scale = m.weight.SCB if m.weight.SCB is not None else m.state.SCB
            found[name + ".weight"] = bnb.functional.int8_vectorwise_dequant(m.weight.data, scale)
    save_file({k: v.contiguous() for k, v in found.items()}, path)
"""
LOAD = DUMP + """
import sys, json, torch
from transformers import AutoModelForCausalLM
for source, target in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(source, device_map="cpu")
    dump(model, target)
    with torch.no_grad():  # in training mode: in the other one it refuses widths that its AVX-512 kernel does not take
        assert torch.isfinite(model.train()(torch.arange(8)[None]).logits).all()
"""
QUANTIZE = DUMP + """
import sys, json, torch
import bitsandbytes as bnb
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
for target, config in json.loads(sys.argv[2]).items():
    after_forward = config.pop("after_forward", False)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=BitsAndBytesConfig(**config),
                                                 dtype=torch.float16, device_map="cpu").eval()
    dump(model, target + ".values")
    if after_forward:
        if not bnb.functional.has_avx512bf16():
            sys.exit(3)
        with torch.no_grad():
            model(torch.arange(8)[None])
    model.save_pretrained(target)
"""
FUNCTIONS = """
import sys, json, torch, bitsandbytes as bnb
from safetensors.torch import save_file
for i, (kind, block, nested, shape, dtype) in enumerate(json.loads(sys.argv[2])):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(getattr(torch, dtype))
    data, state = bnb.functional.quantize_4bit(w, blocksize=block, compress_statistics=nested, quant_type=kind)
    found = {"x.weight." + k: v for k, v in state.as_dict(packed=True).items()}
    save_file(found | {"x.weight": data, "meant": bnb.functional.dequantize_4bit(data, state)},
              f"{sys.argv[1]}/{i}.safetensors")
"""


def run(python: str, script: str, *args: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([python, "-c", script, *map(str, args)], capture_output=True, text=True,
                          env={"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"})
    assert done.returncode in (0, 3), done.stderr[-1500:]
    return done


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, little_llama):
    """A Llama of one block whose MLP width no block divides."""
    return little_llama(tmp_path_factory.mktemp("models") / "tiny", 172)


def nearest(w: torch.Tensor, codec) -> QTensor:
    flat = w.float().reshape(codec.matrix(tuple(w.shape)))
    params = fit_units(flat, codec, None, codec.begin(flat, None))
    return QTensor.pack(codec, tuple(w.shape), encode_units(flat, codec, params), params)


def quantized(path, kind) -> Checkpoint:
    checkpoint = TransformersDirectory().read(path)
    for name, entry in checkpoint.entries.items():
        if "_proj" in (module_of(name) or ""):
            tensor = nearest(entry.load().dequantize(), codecs.get(kind))
            checkpoint.entries[name] = Entry(name, entry.shape, tensor.codec, lambda tensor=tensor: tensor)
    return checkpoint


def test_they_read_ours(peer, tiny, tmp_path):
    """One process for all: importing takes longer than reading."""
    kinds = ["nf4", "nf4-dq", "fp4", "fp4-dq", "nf4-b32", "nf4-b128-dq", "int8"]
    for kind in kinds:
        base.write(BitsAndBytes(), tmp_path / kind, quantized(tiny, kind))
    run(peer("bnb"), LOAD, json.dumps([(str(tmp_path / kind), str(tmp_path / f"{kind}.values")) for kind in kinds]))
    for kind in kinds:
        theirs = safetensors.torch.load_file(tmp_path / f"{kind}.values")
        ours = BitsAndBytes().read(tmp_path / kind)
        assert len(theirs) == 7
        for name, meant in theirs.items():
            assert torch.equal(ours.entries[name].load().dequantize(meant.dtype), meant), (kind, name)


CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
               "bnb_4bit_compute_dtype": "bfloat16"},
    "fp4": {"load_in_4bit": True},
    "fp4-dq": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 5.0},
}


def test_we_read_theirs_and_write_the_same_bytes(peer, tiny, tmp_path):
    run(peer("bnb"), QUANTIZE, tiny, json.dumps({str(tmp_path / kind): config for kind, config in CONFIGS.items()}))
    for kind in CONFIGS:
        source = BitsAndBytes().read(tmp_path / kind)
        meant = safetensors.torch.load_file(tmp_path / f"{kind}.values")
        assert len(meant) == 7
        for name, value in meant.items():
            assert source.entries[name].codec == codecs.get(kind)
            assert torch.equal(source.entries[name].load().dequantize(value.dtype), value), (kind, name)
        base.write(BitsAndBytes(), tmp_path / f"{kind}.ours", source)
        pair = [tmp_path / kind, tmp_path / f"{kind}.ours"]
        a, b = ((path / "model.safetensors").read_bytes() for path in pair)
        assert a == b, kind
        a, b = (json.loads((path / "config.json").read_text())["quantization_config"] for path in pair)
        assert a.pop("llm_int8_skip_modules") is None and b.pop("llm_int8_skip_modules") == ["lm_head"]
        assert a == b, kind


def test_what_a_forward_pass_destroys_is_recognised(peer, tiny, tmp_path):
    """The attention layers only: the others' widths make that forward pass fail by itself."""
    more = {"after_forward": True, "llm_int8_skip_modules": ["gate_proj", "up_proj", "down_proj", "lm_head"]}
    jobs = {str(tmp_path / kind): CONFIGS[kind] | more for kind in ("nf4", "nf4-dq")}
    if run(peer("bnb"), QUANTIZE, tiny, json.dumps(jobs)).returncode == 3:
        pytest.skip("this processor has no AVX-512 BF16")
    for kind in ("nf4", "nf4-dq"):
        with pytest.raises(FewbitsError, match="in a forward pass"):
            BitsAndBytes().read(tmp_path / kind)


def test_every_block_and_shape(peer, tmp_path):
    cases = [(kind, block, nested, shape, dtype)
             for kind in ("nf4", "fp4") for nested in (False, True)
             for block, shape in ((32, (3, 33)), (64, (300, 64)), (64, (5, 172)), (128, (8, 256)), (256, (6, 100)),
                                  (512, (2, 1024)), (1024, (3, 700)), (4096, (5, 1000)), (64, (1, 1)))
             for dtype in ("float32", "float16", "bfloat16")]
    run(peer("bnb"), FUNCTIONS, tmp_path, json.dumps(cases))
    for i, (*_, dtype) in enumerate(cases):
        path = tmp_path / f"case{i}"
        path.mkdir()
        files = safetensors.torch.load_file(tmp_path / f"{i}.safetensors")
        meant = files.pop("meant")
        safetensors.torch.save_file(files, path / "model.safetensors")
        config = {"dtype": dtype, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
        (path / "config.json").write_text(json.dumps(config))
        entry = BitsAndBytes().read(path).entries["x.weight"]
        assert torch.equal(entry.load().dequantize(meant.dtype), meant), cases[i]
        base.write(BitsAndBytes(), tmp_path / f"again{i}", BitsAndBytes().read(path))
        again = safetensors.torch.load_file(tmp_path / f"again{i}" / "model.safetensors")
        assert again.keys() == files.keys() and all(torch.equal(again[k], files[k]) for k in files), cases[i]
