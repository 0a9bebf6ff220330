"""Transformers directories: single and sharded, hostile indexes, what is carried."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from fewbits.containers import base, directory
from fewbits.containers.directory import TransformersDirectory, float_modules, split
from fewbits.errors import FewbitsError

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float16"}


def model(path, tensors=None, config=CONFIG):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = tensors or {
        "model.embed_tokens.weight": torch.randn(6, 4, generator=generator).half(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(8, 4, generator=generator),
        "model.layers.0.mlp.up_proj.bias": torch.randn(8, generator=generator).bfloat16(),
        "model.position_ids": torch.arange(5),
        "model.scale": torch.tensor(0.5),
    }
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return tensors


def test_read(tmp_path):
    tensors = model(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "m" / "evil.py").write_bytes(b"")
    container = TransformersDirectory()
    assert container.detect(tmp_path / "m")
    checkpoint = container.read(tmp_path / "m")
    assert checkpoint.config == CONFIG and checkpoint.files == {"tokenizer.json": b"{}"}
    assert checkpoint.buffers.keys() == {"model.position_ids", "model.scale"}
    assert {n: e.codec.name for n, e in checkpoint.entries.items()} == {
        "model.embed_tokens.weight": "F16", "model.layers.0.mlp.up_proj.weight": "F32",
        "model.layers.0.mlp.up_proj.bias": "BF16"}
    for name, entry in checkpoint.entries.items():
        assert torch.equal(entry.load().dequantize(tensors[name].dtype), tensors[name])
    assert float_modules(checkpoint) == ["model.layers.0.mlp.up_proj"]


def test_written_and_read_back(tmp_path):
    tensors = model(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_bytes(b"{}")
    container = TransformersDirectory()
    base.write(container, tmp_path / "out", container.read(tmp_path / "m"))
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "m/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "out/config.json").read_text()) == CONFIG
    assert (tmp_path / "out/tokenizer.json").read_bytes() == b"{}"
    assert safetensors.torch.load_file(tmp_path / "out/model.safetensors").keys() == tensors.keys()


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "SHARD", 100)
    tensors = model(tmp_path / "m")
    container = TransformersDirectory()
    base.write(container, tmp_path / "out", container.read(tmp_path / "m"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) == 3
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(safetensors.torch.load_file(tmp_path / "out" / file)[name], tensors[name])
    again = container.read(tmp_path / "out")
    assert again.entries.keys() == container.read(tmp_path / "m").entries.keys()


def test_split_keeps_an_entry_together():
    specs = {"a": {"a.x": ("U8", (6,)), "a.y": ("U8", (6,))}, "b": {"b": ("U8", (4,))}, "c": {"c": ("U8", (40,))},
             "d": {"d": ("U8", (1,))}}
    assert split(specs, 16) == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize("name", ["../m/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b", "", 3])
def test_an_index_must_stay_in_its_directory(tmp_path, name):
    model(tmp_path / "m")
    (tmp_path / "m/model.safetensors").rename(tmp_path / "m/part.safetensors")
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(FewbitsError, match="x: .* is not the name of a file in this directory"):
        TransformersDirectory().read(tmp_path / "m")


def test_a_missing_shard_and_a_missing_tensor(tmp_path):
    model(tmp_path / "m", {"a": torch.ones(2)})
    (tmp_path / "m/model.safetensors").rename(tmp_path / "m/part.safetensors")
    index = tmp_path / "m/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors", "b": "gone.safetensors"}}))
    with pytest.raises(FewbitsError, match="gone.safetensors, which is missing"):
        TransformersDirectory().read(tmp_path / "m")
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors", "b": "part.safetensors"}}))
    with pytest.raises(FewbitsError, match="b should be in part.safetensors, and is not"):
        TransformersDirectory().read(tmp_path / "m")


def test_a_tensor_in_two_shards(tmp_path):
    model(tmp_path / "m", {"a": torch.ones(2)})
    data = (tmp_path / "m/model.safetensors").read_bytes()
    (tmp_path / "m/model.safetensors").rename(tmp_path / "m/one.safetensors")
    (tmp_path / "m/two.safetensors").write_bytes(data)
    (tmp_path / "m/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(FewbitsError, match="a: is in one.safetensors too"):
        TransformersDirectory().read(tmp_path / "m")


def test_weights_of_other_types_are_refused(tmp_path):
    model(tmp_path / "m", {"x.weight": torch.ones(2, 2, dtype=torch.float64)})
    with pytest.raises(FewbitsError, match="x.weight: F64 weights are not read"):
        TransformersDirectory().read(tmp_path / "m")


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_a_broken_config(tmp_path, text):
    model(tmp_path / "m")
    (tmp_path / "m/config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FewbitsError, match="config.json: not"):
        TransformersDirectory().read(tmp_path / "m")


def test_files_of_other_names_are_not_written(tmp_path):
    model(tmp_path / "m")
    checkpoint = TransformersDirectory().read(tmp_path / "m")
    checkpoint.files["../escape"] = b""
    with pytest.raises(FewbitsError, match="../escape"):
        base.write(TransformersDirectory(), tmp_path / "out", checkpoint)
    assert not (tmp_path / "out").exists() and not (tmp_path / "escape").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"m"}
