"""GPTQ files without a configuration: bits and groups from shapes, `.pt` on request, zero biases left out."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from fewbits import codecs, containers
from fewbits.containers.gptq import to_file
from fewbits.errors import FewbitsError
from tests.containers.intk import CONFIG, random_tensor

WIDTHS = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 1, "num_attention_heads": 4,
          "num_key_value_heads": 4, "vocab_size": 32, "max_position_embeddings": 64, "tie_word_embeddings": False}
LAYERS = {"model.layers.0.mlp.up_proj": (320, 128), "model.layers.0.mlp.down_proj": (128, 320),
          "model.layers.0.self_attn.q_proj": (128, 128)}


def layers(kind, g_idx=True, version="gptq"):
    """Tensors of the file, and the layers they hold."""
    meant = {module: random_tensor(kind, shape, i, zero=False) for i, (module, shape) in enumerate(LAYERS.items())}
    files = {f"{module}.{k}": v for module, tensor in meant.items() for k, v in to_file(tensor, version).items()
             if g_idx or k != "g_idx"}
    return files, meant


def folder(path, config=None):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | WIDTHS | (config or {})))
    return path


def check(found, meant):
    assert found.container == "gptq"
    for module, tensor in meant.items():
        entry = found.entries[f"{module}.weight"]
        assert entry.codec == tensor.codec and torch.equal(entry.load().dequantize(), tensor.dequantize()), module


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", ["g64", "g32", "row"])
@pytest.mark.parametrize("asym", ["", "-asym"])
@pytest.mark.parametrize("g_idx", [True, False])
def test_bits_and_groups_from_shapes(tmp_path, bits, group, asym, g_idx):
    files, meant = layers(f"int{bits}-{group}{asym}", g_idx)
    path = folder(tmp_path / "m") / "model.safetensors"
    safetensors.torch.save_file(files, path)
    check(containers.open(path.parent), meant)
    check(containers.open(path), meant)


UNHEARD = {"model_type": "unheard", "architectures": ["Unheard"]}


@pytest.mark.parametrize("config", [UNHEARD, {}])
def test_a_file_by_its_name(tmp_path, config):
    """A model that no table knows tells its widths through g_idx, or through the bits of its zero points."""
    files, meant = layers("int4-g64-asym", g_idx=False)
    path = folder(tmp_path / "m", config) / "llama-7b-4bit-64g.safetensors"
    safetensors.torch.save_file(files, path)
    (path.parent / "other-model.safetensors").write_bytes(b"")
    check(containers.open(path), meant)
    with pytest.raises(FewbitsError, match="2 safetensors files"):
        containers.open(path.parent)


@pytest.mark.parametrize("name,message", [
    ("llama-3bit-64g", "its name says 3 bits, its tensors 4"), ("llama-4bit-128g", "says 128 columns a group"),
    ("llama-13b-4bits", None), ("llama-7B-GPTQ-4bit-64g.act-order", None), ("llama-3-8b", None)])
def test_the_name_is_a_check(tmp_path, name, message):
    files, meant = layers("int4-g64")
    path = folder(tmp_path / "m") / f"{name}.safetensors"
    safetensors.torch.save_file(files, path)
    if message is None:
        check(containers.open(path), meant)
    else:
        with pytest.raises(FewbitsError, match=message):
            containers.open(path)


def test_act_order(tmp_path):
    tensor = random_tensor("int4-g32", (128, 320))
    order = torch.randperm(320, generator=torch.Generator().manual_seed(0))
    tensor = type(tensor)(tensor.codec, tensor.shape, tensor.planes, order)
    path = folder(tmp_path / "m") / "x.safetensors"
    name = "model.layers.0.mlp.down_proj"
    safetensors.torch.save_file({f"{name}.{k}": v for k, v in to_file(tensor, "gptq").items()}, path)
    check(containers.open(path), {name: tensor})


def test_biases_of_zeros(tmp_path):
    """Left out where the architecture has none; a bias that says something stays, and so does one that belongs."""
    files, _ = layers("int4-g64")
    names = list(LAYERS)
    files |= {f"{names[0]}.bias": torch.zeros(320).half(), f"{names[1]}.bias": torch.ones(128).half()}
    path = folder(tmp_path / "m") / "model.safetensors"
    safetensors.torch.save_file(files, path)
    found = containers.open(path).entries
    assert f"{names[0]}.bias" not in found and f"{names[1]}.bias" in found
    (path.parent / "config.json").write_text(json.dumps({"model_type": "unheard"}))
    assert f"{names[0]}.bias" in containers.open(path).entries


def only(kind, shape, **changes):
    tensor = random_tensor(kind, shape, zero=False)
    kept = {k: t for k, t in to_file(tensor, "gptq").items() if changes.get(k, 0) is not None}
    return {f"x.{k}": changes.get(k, lambda t: t)(t).contiguous() for k, t in kept.items()}


AMBIGUOUS = {
    "bits": (only("int4-row", (1, 8), g_idx=None), r"fit 2 or 3 or 4 or 8 bits"),
    "no bits": (only("int4-g16", (32, 64), qzeros=lambda t: t[:, :1]), "fit no number of bits"),
    "no bits of these columns": (only("int4-g16", (32, 64), g_idx=lambda t: t[:40]), "of 40 columns fit no number of"),
    "groups": (only("int4-g48", (32, 96), g_idx=None), "groups of 48 or 64 columns"),
    "version": ({f"x.{k}": v for k, v in to_file(random_tensor("int4-g16", (32, 64)), "gptq_v2").items()},
                "in version 1 would mean one more"),
    "AWQ": (only("int4-g16", (32, 64), qweight=lambda t: torch.zeros(64, 4, dtype=torch.int32)), "as AWQ has it"),
    "zeros in floats": (only("int4-g16", (32, 64), qzeros=None) | {"x.zeros": torch.zeros(4, 32)}, "not integers"),
    "no zeros": (only("int4-g16", (32, 64), qzeros=None), "needs x.qzeros, which is missing"),
    "no group 0": (only("int4-g16", (32, 64), g_idx=lambda t: t + 4), "where .* was expected of 4 bits in groups of 1"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_shapes_do_not_say_is_refused(tmp_path, case):
    files, message = AMBIGUOUS[case]
    path = folder(tmp_path / "m") / "model.safetensors"
    safetensors.torch.save_file(files, path)
    with pytest.raises(FewbitsError, match=message) as error:
        containers.open(path)
    assert str(path) in str(error.value)


def test_an_old_configuration_settles_it(tmp_path):
    path = folder(tmp_path / "m", UNHEARD) / "model.safetensors"
    safetensors.torch.save_file(AMBIGUOUS["version"][0], path)
    (path.parent / "quantize_config.json").write_text(json.dumps(
        {"bits": 4, "group_size": 16, "checkpoint_format": "gptq_v2"}))
    assert containers.open(path.parent).entries["x.weight"].codec == codecs.get("int4-g16")


# pickles --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_on_request(tmp_path, zipped):
    files, meant = layers("int4-g64-asym", g_idx=False)
    path = folder(tmp_path / "m") / "llama-4bit-64g.pt"
    torch.save(files, path, _use_new_zipfile_serialization=zipped)
    for given in (path, path.parent):
        with pytest.raises(FewbitsError) as error:
            containers.open(given)
        assert "--allow-pickle" in error.value.hint
        check(containers.open(given, allow_pickle=True), meant)


def test_pickles_of_floats(tmp_path):
    path = folder(tmp_path / "m", UNHEARD)
    tensors = {"a.weight": torch.randn(4, 3).t(), "b": torch.arange(3)}
    for i, (name, tensor) in enumerate(tensors.items()):
        torch.save({name: tensor}, path / f"pytorch_model-{i}.bin")
    with pytest.raises(FewbitsError, match="2 pickles, and no"):
        containers.open(path, allow_pickle=True)
    weight_map = {name: f"pytorch_model-{i}.bin" for i, name in enumerate(tensors)}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = containers.open(path, allow_pickle=True)
    assert found.container == "transformers" and found.buffers["b"].load().tolist() == [0, 1, 2]
    assert torch.equal(found.entries["a.weight"].load().dequantize(), tensors["a.weight"])


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


HOSTILE_PICKLES = {
    "code": ({"a": Evil()}, "not a pickle of tensors alone"),
    "a list": ([torch.ones(1)], "holds list"),
    "a number": ({"a": 3}, "a: int, where a tensor"),
    "numbered tensors": ({1: torch.ones(1)}, "1: Tensor, where a tensor"),
    "more than is there": ({"a": torch.ones(1).expand(1 << 40)}, r"takes 4398046511104 bytes, and 4 are there"),
    "a sparse tensor": ({"a": torch.eye(3).to_sparse()}, "a: Tensor, where a tensor"),
}


@pytest.mark.parametrize("case", HOSTILE_PICKLES)
def test_hostile_pickles(tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value, message = HOSTILE_PICKLES[case]
    path = folder(tmp_path / "m") / "model.pt"
    torch.save(value, path)
    with pytest.raises(FewbitsError, match=message) as error:
        containers.open(path, allow_pickle=True)
    assert str(path) in str(error.value) and not (tmp_path / "evil").exists()


def test_truncated_pickles(tmp_path):
    path = folder(tmp_path / "m") / "model.pt"
    torch.save({"a": torch.ones(4)}, path)
    data = path.read_bytes()
    for size in range(0, len(data), 37):
        path.write_bytes(data[:size])
        with pytest.raises(FewbitsError):
            containers.open(path, allow_pickle=True)


@pytest.mark.parametrize("name", ["../x.bin", "x.sh", 3])
def test_an_index_of_pickles_stays_in_its_directory(tmp_path, name):
    path = folder(tmp_path / "m")
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FewbitsError, match="index.json"):
        containers.open(path, allow_pickle=True)


def test_a_whole_model_of_that_time(tmp_path, tiny):
    """No configuration, no g_idx, biases of zeros and rotary frequencies beside: it loads and computes the same."""
    import fewbits

    base = tmp_path / "now"
    fewbits.quantize(tiny, base, "int4-g32", solver="nearest")
    meant = fewbits.load(base)(torch.arange(8)[None]).logits
    files = safetensors.torch.load_file(base / "model.safetensors")
    old = {k: v for k, v in files.items() if not k.endswith("g_idx")}
    old |= {k.replace("qweight", "bias"): torch.zeros(v.shape[1]).half() for k, v in files.items() if "qweight" in k}
    old |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(12) for i in range(2)}
    path = tmp_path / "then" / "tiny-4bit-32g.safetensors"
    path.parent.mkdir()
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]
    (path.parent / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(old, path)
    found = containers.open(path)
    assert found.entries.keys() - {n for n in found.entries if "inv_freq" in n} == containers.open(base).entries.keys()
    assert torch.equal(fewbits.load(path)(torch.arange(8)[None]).logits, meant)
