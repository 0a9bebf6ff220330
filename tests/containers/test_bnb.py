"""bitsandbytes directories against layouts worked by hand; hostile files; what is written is read back."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from fewbits import codecs
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import encode_units, fit_units
from fewbits.codecs.floats import F16
from fewbits.containers import base
from fewbits.containers.bnb import BitsAndBytes
from fewbits.containers.directory import TransformersDirectory
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor

MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float16"}
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
FP4 = [x / 12 for x in (0, 0.0625, 8, 12, 4, 6, 2, 3)]


def directory(path, tensors, **config):
    path.mkdir()
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True} | config
    (path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": settings}))
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def text(value) -> torch.Tensor:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return torch.tensor(list(data), dtype=torch.uint8)


def state(kind="nf4", block=64, shape=(2, 64), **more):
    return {"quant_type": kind, "blocksize": block, "dtype": "float16", "shape": list(shape)} | more


def four_bits(shape=(2, 64), block=64, kind="nf4"):
    """Codes 0 … 15 in turn, first in the high nibble; block i scaled by i + 1."""
    count = shape[0] * shape[1]
    blocks = -(-count // block)
    codes = (torch.arange(count) % 16).tolist() + [0] * (count % 2)
    weight = torch.tensor([codes[i] << 4 | codes[i + 1] for i in range(0, count, 2)], dtype=torch.uint8)
    return {NAME: weight.reshape(-1, 1), f"{NAME}.absmax": torch.arange(1.0, blocks + 1),
            f"{NAME}.quant_map": torch.tensor(NF4 if kind == "nf4" else FP4 + [-x for x in FP4]),
            f"{NAME}.quant_state.bitsandbytes__{kind}": text(state(kind, block, shape))}


def dynamic_map() -> torch.Tensor:
    """The 8-bit levels of nested scales: seven decades below 1, in the middle of 2^i intervals each, both signs."""
    found = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        found += middles + [-x for x in middles]
    return torch.tensor(sorted(found))


def nested(shape=(2, 64), block=64):
    files = four_bits(shape, block)
    blocks = len(files[f"{NAME}.absmax"])
    files[f"{NAME}.absmax"] = (torch.arange(blocks) * 37 % 256).to(torch.uint8)
    files[f"{NAME}.nested_absmax"] = torch.arange(1.0, 1 + -(-blocks // 256))
    files[f"{NAME}.nested_quant_map"] = dynamic_map()
    files[f"{NAME}.quant_state.bitsandbytes__nf4"] = text(state(
        "nf4", block, shape, nested_blocksize=256, nested_dtype="float32", nested_offset=0.0517578125))
    return files


def load(path) -> QTensor:
    return BitsAndBytes().read(path).entries[NAME].load()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(2, 64), (3, 32), (3, 33), (5, 40), (1, 1), (1, 3)])
@pytest.mark.parametrize("block", [32, 64])
def test_four_bits_by_hand(tmp_path, kind, shape, block):
    path = directory(tmp_path / "m", four_bits(shape, block, kind))
    levels = NF4 if kind == "nf4" else FP4 + [-x for x in FP4]
    flat = torch.arange(shape[0] * shape[1])
    meant = torch.tensor(levels)[flat % 16] * (flat // block + 1).float()
    entry = BitsAndBytes().read(path).entries[NAME]
    assert entry.codec == codecs.get(f"{kind}-b{block}") and entry.shape == shape
    assert torch.equal(entry.load().dequantize().reshape(-1), meant)


@pytest.mark.parametrize("shape,block", [((2, 64), 64), ((3, 33), 32), ((300, 64), 64)])
def test_nested_by_hand(tmp_path, shape, block):
    files = nested(shape, block)
    path = directory(tmp_path / "m", files)
    flat = torch.arange(shape[0] * shape[1])
    codes = files[f"{NAME}.absmax"].long()
    absmax = dynamic_map()[codes] * files[f"{NAME}.nested_absmax"][torch.arange(len(codes)) // 256] + 0.0517578125
    meant = torch.tensor(NF4)[flat % 16] * absmax[flat // block]
    tensor = load(path)
    assert tensor.codec == codecs.get("nf4-dq" if block == 64 else f"nf4-b{block}-dq")
    assert torch.equal(tensor.dequantize().reshape(-1), meant)


def test_eight_bits_by_hand(tmp_path):
    codes = torch.tensor([[-127, 0, 127], [1, 2, -3]], dtype=torch.int8)
    path = directory(tmp_path / "m", {NAME: codes, f"{MODULE}.SCB": torch.tensor([254.0, 127.0]),
                                      f"{MODULE}.weight_format": torch.tensor(0, dtype=torch.uint8)},
                     load_in_4bit=False, load_in_8bit=True)
    assert torch.allclose(load(path).dequantize(), torch.tensor([[-254.0, 0, 254], [1, 2, -3]]), rtol=1e-6)


def nearest(w: torch.Tensor, codec) -> QTensor:
    flat = w.float().reshape(codec.matrix(tuple(w.shape)))
    params = fit_units(flat, codec, None, codec.begin(flat, None))
    return QTensor.pack(codec, tuple(w.shape), encode_units(flat, codec, params), params)


def checkpoint(path, tensors: dict[str, QTensor], **config) -> Checkpoint:
    entries = {name: Entry(name, t.shape, t.codec, lambda t=t: t) for name, t in tensors.items()}
    return Checkpoint(path, "test", CONFIG | config, entries)


def random(shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["nf4", "nf4-b32", "nf4-dq", "nf4-b128-dq", "fp4", "fp4-dq", "int8"])
@pytest.mark.parametrize("shape", [(8, 64), (300, 128), (7, 33), (5, 172), (1, 1)])
def test_written_checked_and_read_back(tmp_path, kind, shape):
    data = random((3, 4)).half()
    source = checkpoint(tmp_path / "source", {
        NAME: nearest(random(shape), codecs.get(kind)),
        "model.layers.0.mlp.gate.weight": QTensor(F16, (3, 4), {"data": data}),
        "model.embed_tokens.weight": QTensor(F16, (3, 4), {"data": data})})
    got = base.write(BitsAndBytes(), tmp_path / "out", source)
    assert got.entries[NAME].codec == codecs.get(kind)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["load_in_8bit"] is (kind == "int8") and config["load_in_4bit"] is (kind != "int8")
    assert config["llm_int8_skip_modules"] == ["model.layers.0.mlp.gate", "lm_head"]
    assert config["bnb_4bit_use_double_quant"] is kind.endswith("dq")
    assert BitsAndBytes().detect(tmp_path / "out") and not TransformersDirectory().detect(tmp_path / "out")
    again = base.write(BitsAndBytes(), tmp_path / "again", got)
    assert again.facts == got.facts
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def test_the_serialised_state_is_that_of_bitsandbytes(tmp_path):
    base.write(BitsAndBytes(), tmp_path / "out", checkpoint(tmp_path / "s", {
        NAME: nearest(random((4, 64)), codecs.get("nf4"))}))
    found = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    assert {k: (str(v.dtype), tuple(v.shape)) for k, v in found.items()} == {
        NAME: ("torch.uint8", (128, 1)), f"{NAME}.absmax": ("torch.float32", (4,)),
        f"{NAME}.quant_map": ("torch.float32", (16,)),
        f"{NAME}.quant_state.bitsandbytes__nf4": ("torch.uint8", (76,))}
    assert bytes(found[f"{NAME}.quant_state.bitsandbytes__nf4"].tolist()) == \
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [4, 64]}'


def test_codes_stored_as_another_type(tmp_path):
    """FSDP keeps the packed bytes under a float type; the bytes are the same."""
    files = four_bits()
    path = directory(tmp_path / "m", files | {NAME: files[NAME].reshape(-1).view(torch.bfloat16).reshape(-1, 1)})
    plain = directory(tmp_path / "n", files)
    assert torch.equal(load(path).dequantize(), load(plain).dequantize())


def drop(files, part):
    return {k: v for k, v in files.items() if k != f"{NAME}{part}"}


def put(files, part, value):
    return files | {f"{NAME}{part}": value}


def states(value, files=None):
    return put(files or four_bits(), ".quant_state.bitsandbytes__nf4", text(value))


NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
FORWARD = "in a forward pass"
EIGHT = {NAME: torch.ones(4, 6, dtype=torch.int8), f"{MODULE}.SCB": torch.ones(4)}
HOSTILE_AT_OPEN = {
    "no weight": (drop(four_bits(), ""), f"needs {NAME}, which is missing"),
    "no absmax": (drop(four_bits(), ".absmax"), "needs .*absmax, which is missing"),
    "no quant_map": (drop(four_bits(), ".quant_map"), "needs .*quant_map, which is missing"),
    "no state": (drop(four_bits(), ".quant_state.bitsandbytes__nf4"), "whose quant_state is missing"),
    "weight alone": ({NAME: four_bits()[NAME]}, r"U8 \[64, 1\] is a packed weight"),
    "nothing nested": (states(state(**NESTED)), "needs .*nested_absmax, which is missing"),
    "nested absmax missing": (drop(nested(), ".nested_absmax"), "needs .*nested_absmax, which is missing"),
    "nested map missing": (drop(nested(), ".nested_quant_map"), "needs .*nested_quant_map, which is missing"),
    "nested, the state plain": (states(state(), nested()), r"absmax: U8 \[2\], where F32 \[2\] was expected"),
    "absmax too long": (put(four_bits(), ".absmax", torch.ones(3)), r"absmax: F32 \[3\], where F32 \[2\]"),
    "absmax too short": (put(four_bits(), ".absmax", torch.ones(1)), r"absmax: F32 \[1\], where F32 \[2\]"),
    "nested absmax too long": (put(nested(), ".nested_absmax", torch.ones(2)), r"nested_absmax: F32 \[2\]"),
    "weight too short": (put(four_bits(), "", torch.ones(63, 1, dtype=torch.uint8)),
                         r"63 bytes, where the shape \[2, 64\] takes 64"),
    "after a forward pass": (put(four_bits(), ".absmax", torch.ones(1, 2).bfloat16()), FORWARD),
    "nested, after a forward pass": (states(state(**NESTED | {"nested_dtype": "float16"}), nested()), FORWARD),
    "in the kernel's layout": (put(four_bits(), "", four_bits()[NAME].reshape(2, 32)), "order of bitsandbytes' AVX"),
    "not JSON": (states(b"{"), "not the JSON"),
    "not an object": (states([]), "not the JSON"),
    "no blocksize": (states({"quant_type": "nf4", "shape": [2, 64]}), "not the JSON"),
    "another type": (states(state("fp4")), "quant_type 'fp4' in a tensor called nf4"),
    "unknown type": (drop(four_bits(), ".quant_state.bitsandbytes__nf4") | {
        f"{NAME}.quant_state.bitsandbytes__af4": text(state("af4"))}, "quant_type 'af4'"),
    "blocksize": (states(state(block=48)), "blocksize 48"),
    "huge shape": (states(state(shape=(2**40, 2**40))), "takes 604462909807314587353088"),
    "negative shape": (states(state(shape=(-2, -64))), r"shape \[-2, -64\]"),
    "empty shape": (states(state(shape=())), r"shape \[\]"),
    "nested blocks": (states(state(**NESTED | {"nested_blocksize": 128}), nested()), "nested_blocksize 128"),
    "NaN offset": (states(state(**NESTED | {"nested_offset": float("nan")}), nested()), "nested_offset nan"),
    "no offset": (states(state(nested_blocksize=256, nested_dtype="float32"), nested()), "nested_offset None"),
    "8 bits without a weight": ({f"{MODULE}.SCB": torch.ones(4)}, f"SCB: needs {NAME}"),
    "8 bits without scales": ({NAME: EIGHT[NAME]}, r"I8 \[4, 6\] is a packed weight"),
    "SCB too long": (EIGHT | {f"{MODULE}.SCB": torch.ones(6)}, r"SCB: F32 \[6\], where F32 \[4\]"),
    "8 bits in tiles": (EIGHT | {f"{MODULE}.weight_format": torch.tensor(2, dtype=torch.uint8)},
                        "weight_format: 2: only row-major"),
    "8 bits of floats": (EIGHT | {NAME: torch.ones(4, 6)}, r"F32 \[4, 6\], where I8"),
}


@pytest.mark.parametrize("case", HOSTILE_AT_OPEN)
def test_hostile_directories_are_refused_when_opened(tmp_path, case):
    files, message = HOSTILE_AT_OPEN[case]
    path = directory(tmp_path / "m", files)
    with pytest.raises(FewbitsError, match=message) as error:
        BitsAndBytes().read(path)
    assert str(path) in str(error.value) and MODULE in str(error.value)


def spoiled(tensor, at, value):
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


HOSTILE_AT_LOAD = {
    "NaN scale": (put(four_bits(), ".absmax", spoiled(torch.ones(2), 1, float("nan"))), r"absmax: nan at \[1\]"),
    "infinite scale": (put(four_bits(), ".absmax", spoiled(torch.ones(2), 0, float("inf"))), r"absmax: inf at \[0\]"),
    "infinite nested scale": (put(nested(), ".nested_absmax", torch.full((1,), -float("inf"))), "nested_absmax: -inf"),
    "other levels": (put(four_bits(), ".quant_map", torch.linspace(-1, 1, 16)), "quant_map: other levels"),
    "other nested levels": (put(nested(), ".nested_quant_map", spoiled(dynamic_map(), 3, 0.0)),
                            "nested_quant_map: other levels"),
    "NaN in SCB": (EIGHT | {f"{MODULE}.SCB": spoiled(torch.ones(4), 3, float("nan"))}, r"SCB: nan at \[3\]"),
}


@pytest.mark.parametrize("case", HOSTILE_AT_LOAD)
def test_hostile_tensors_are_refused_when_loaded(tmp_path, case):
    files, message = HOSTILE_AT_LOAD[case]
    path = directory(tmp_path / "m", files)
    with pytest.raises(FewbitsError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_what_it_cannot_hold(tmp_path):
    def reason(name, kind, others=(), **config):
        tensors = dict(others) | {name: nearest(random((4, 64)), codecs.get(kind))}
        source = checkpoint(tmp_path, tensors, **config)
        return BitsAndBytes().accepts(source, source.entries[name])

    assert reason(NAME, "nf4") is None and reason(NAME, "int8") is None and reason(NAME, "bf16") is None
    assert "embeddings" in reason("model.embed_tokens.weight", "nf4")
    assert "tied" in reason("lm_head.weight", "nf4", tie_word_embeddings=True)
    assert "nf4, fp4 and int8 only" in reason(NAME, "int4-g32")
    assert "blocks of 32, 64" in reason(NAME, "nf4-b16")
    first = {"a.weight": nearest(random((4, 64)), codecs.get("int8"))}
    assert "either in 4 or in 8 bits" in reason(NAME, "nf4", first)


def test_opening_needs_no_torch(tmp_path):
    directory(tmp_path / "m", nested())
    code = ("import sys; from pathlib import Path; from fewbits.containers.bnb import BitsAndBytes;"
            f"c = BitsAndBytes().read(Path({str(tmp_path / 'm')!r}));"
            f"print(c.entries[{NAME!r}].codec.name, 'torch' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "nf4-dq False"
