"""gpt-oss directories against Transformers' own conversion; hostile files; what is written is read back."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
import transformers
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fewbits import codecs, load
from fewbits import quantize as quantize_model
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.floats import BF16
from fewbits.containers import base
from fewbits.containers import open as open_model
from fewbits.containers.mxfp4 import CODEC, Mxfp4
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor

NAME = "model.layers.0.mlp.experts.gate_up_proj"
BLOCKS, SCALES = f"{NAME}_blocks", f"{NAME}_scales"
CONFIG = {"architectures": ["SomeForCausalLM"], "model_type": "some"}


def directory(path, tensors):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "mxfp4"}}))
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def files(shape=(3, 6, 96), low=0, high=253):
    generator = torch.Generator().manual_seed(0)
    groups = (*shape[:-1], shape[-1] // 32)
    return {BLOCKS: torch.randint(0, 256, (*groups, 16), dtype=torch.uint8, generator=generator),
            SCALES: torch.randint(low, high, groups, dtype=torch.uint8, generator=generator)}


@pytest.mark.parametrize("shape", [(3, 6, 96), (1, 1, 32), (4, 10, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_transformers(tmp_path, shape, dtype):
    found = files(shape)
    entry = open_model(directory(tmp_path / "m", found)).entries[NAME]
    assert entry.shape == shape and entry.codec == CODEC
    meant = convert_moe_packed_tensors(found[BLOCKS], found[SCALES], dtype=dtype)  # [experts, in, out]
    assert torch.equal(entry.load().dequantize(dtype), meant.transpose(1, 2))


def test_by_hand(tmp_path):
    """Byte 0 has elements 0 (low half) and 1, which ggml keeps in the low halves of bytes 0 and 1."""
    blocks = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    blocks[..., 0], blocks[..., 8] = 0xA3, 0x71  # codes 3 and 10 are 1.5 and -1, 1 and 7 are 0.5 and 6
    found = {BLOCKS: blocks, SCALES: torch.full((1, 1, 1), 128, dtype=torch.uint8)}
    tensor = open_model(directory(tmp_path / "m", found)).entries[NAME].load()
    assert tensor.planes["blocks"].tolist() == [[128, 0x13, 0x7A, *[0] * 14]]
    assert tensor.dequantize()[0, 0, [0, 1, 16, 17]].tolist() == [3, -2, 1, 12]


def checkpoint(path, tensors: dict[str, QTensor]) -> Checkpoint:
    entries = {name: Entry(name, t.shape, t.codec, lambda t=t: t) for name, t in tensors.items()}
    return Checkpoint(path, "test", CONFIG, entries)


def some(codec, shape) -> QTensor:
    generator = torch.Generator().manual_seed(1)
    return QTensor(codec, shape, {k: torch.randint(0, 253, size, generator=generator).to(getattr(torch, dtype))
                                  for k, (dtype, size) in codec.planes(shape).items()})


def test_written_checked_and_read_back(tmp_path):
    tensors = {NAME: some(CODEC, (3, 8, 64)), "model.layers.0.mlp.experts.down_proj": some(CODEC, (3, 64, 32)),
               "model.layers.0.mlp.experts.gate_up_proj_bias": some(BF16, (3, 8)),
               "model.layers.0.mlp.router.weight": some(BF16, (3, 64)),
               "model.embed_tokens.weight": some(BF16, (9, 64)),
               "model.layers.1.mlp.experts.down_proj": some(BF16, (3, 64, 32)), "lm_head.weight": some(BF16, (9, 64))}
    got = base.write(Mxfp4(), tmp_path / "out", checkpoint(tmp_path / "s", tensors))
    for name, tensor in tensors.items():
        assert all(torch.equal(got.entries[name].load().planes[k], p) for k, p in tensor.planes.items())
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "mxfp4", "modules_to_not_convert": [
        "model.layers.0.mlp.router", "lm_head", "model.embed_tokens", "model.layers.1.mlp.experts"]}
    found = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    assert found[BLOCKS].shape == (3, 8, 2, 16) and found[SCALES].shape == (3, 8, 2)
    base.write(Mxfp4(), tmp_path / "again", got)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def test_transformers_loads_what_is_written(tmp_path):
    """A small gpt-oss: every value is ours, and so are the logits."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2,
                                       head_dim=16, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
                                       num_experts_per_tok=2, initializer_range=0.2,
                                       rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    transformers.GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")
    quantize_model(tmp_path / "source", tmp_path / "out", "MXFP4", container="mxfp4")
    ours = open_model(tmp_path / "out")
    quantized = [n for n, e in ours.entries.items() if e.codec == CODEC]
    assert len(quantized) == 4 and all(len(ours.entries[n].shape) == 3 for n in quantized)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    theirs = dict(model.named_parameters())
    assert theirs.keys() == ours.entries.keys()
    for name, entry in ours.entries.items():
        meant = entry.load().dequantize(torch.bfloat16)
        assert torch.equal(theirs[name], meant.transpose(1, 2) if name in quantized else meant), name
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.allclose(model.float()(ids).logits, load(ours)(ids).logits, atol=1e-4)


@pytest.mark.parametrize("name,codec,shape,message", [
    (NAME, "Q4_0", (3, 8, 64), "MXFP4 and floats only"),
    (f"{NAME}.weight", "MXFP4", (3, 8, 64), "only fused experts"),
    ("model.layers.0.self_attn.q_proj.weight", "MXFP4", (8, 64), "only fused experts")])
def test_what_is_not_written(tmp_path, name, codec, shape, message):
    with pytest.raises(FewbitsError, match=message):
        base.write(Mxfp4(), tmp_path / "out", checkpoint(tmp_path / "s", {name: some(codecs.get(codec), shape)}))


HOSTILE = {
    "no scales": ({BLOCKS: files()[BLOCKS]}, f"needs {SCALES}, which is missing"),
    "no blocks": ({SCALES: files()[SCALES]}, "whose blocks are missing"),
    "floats": (files() | {BLOCKS: torch.ones(3, 6, 3, 16)}, r"F32 \[3, 6, 3, 16\], where U8"),
    "blocks of 8 bytes": (files() | {BLOCKS: torch.zeros(3, 6, 6, 8).byte()}, r"U8 \[3, 6, 6, 8\], where U8"),
    "flat blocks": (files() | {BLOCKS: torch.zeros(3, 6, 48, dtype=torch.uint8)}, r"\[3, 6, 48\], where U8"),
    "no experts": (files() | {BLOCKS: torch.zeros(0, 6, 3, 16, dtype=torch.uint8)}, r"\[0, 6, 3, 16\], where U8"),
    "too few scales": (files() | {SCALES: torch.zeros(3, 6, 2).byte()}, r"\[3, 6, 2\], where U8 \[3, 6, 3\]"),
    "scales in floats": (files() | {SCALES: torch.ones(3, 6, 3)}, r"F32 \[3, 6, 3\], where U8 \[3, 6, 3\]"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_at_opening(tmp_path, case):
    found, message = HOSTILE[case]
    with pytest.raises(FewbitsError, match=message):
        open_model(directory(tmp_path / "m", found))


def test_a_scale_that_is_nan(tmp_path):
    found = files()
    found[SCALES][1, 2, 0] = 255
    entry = open_model(directory(tmp_path / "m", found)).entries[NAME]
    with pytest.raises(FewbitsError, match=r"_scales: NaN \(255\) at \[1, 2, 0\]"):
        entry.load()
