from __future__ import annotations

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from fewbits import arch, inspect, load, plan
from fewbits.errors import FewbitsError
from fewbits.recipe import ModelFacts

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
          "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 32,
          "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dtype": "float16"}
WITHOUT_TORCH = """
import json, sys
from fewbits import inspect, plan
print(inspect(sys.argv[1]).parameters, len(plan(sys.argv[1]).rows))
assert "torch" not in sys.modules and "transformers" not in sys.modules, sorted(sys.modules)
"""


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    save_file({f.name: np.zeros(f.shape, np.float16) for f in ModelFacts.from_config(CONFIG).tensors},
              path / "model.safetensors")
    return path


@pytest.fixture
def gguf_file(tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for f in arch.lookup(CONFIG).fields:
        if CONFIG.get(f.hf) is not None:
            writer.add_key_value(f"llama.{f.key}", CONFIG[f.hf], gguf.GGUFValueType[f.type])
    writer.add_name("a tiny one")
    writer.add_array("made.of", list(range(20)))
    for fact in ModelFacts.from_config(CONFIG).tensors:
        values = np.zeros(fact.shape, np.float32)
        if len(fact.shape) == 1:
            writer.add_tensor(fact.gguf, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(fact.gguf, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MATRICES = 32 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
VECTORS = 5 * 64


def test_a_directory(directory):
    info = inspect(directory)
    assert (info.container, info.architecture, info.parameters) == ("transformers", "LlamaForCausalLM",
                                                                    MATRICES + VECTORS)
    assert info.tensor_bytes == 2 * info.parameters and info.bits_per_weight == 16
    assert info.nbytes == sum(f.stat().st_size for f in directory.iterdir())
    assert [(c.codec, c.tensors) for c in info.codecs] == [("F16", len(info.tensors))]
    assert info.chat_template and not info.tokenizer


def test_a_gguf_file(gguf_file):
    info = inspect(gguf_file)
    assert [(c.codec, c.parameters) for c in info.codecs] == [("Q8_0", MATRICES), ("F32", VECTORS)]
    assert info.codecs[0].nbytes == MATRICES * 34 // 32
    assert info.metadata["general.name"] == "a tiny one" and info.metadata["made.of"] == "20 values"
    assert info.nbytes == gguf_file.stat().st_size
    table = {t.name: t for t in info.tensors}
    assert table["model.layers.1.mlp.down_proj.weight"].shape == (64, 96)


def test_json(directory):
    assert json.loads(json.dumps(inspect(directory).to_json()))["codecs"][0]["codec"] == "F16"


@pytest.mark.parametrize("kind", ["directory", "gguf_file"])
def test_neither_torch_nor_transformers_is_imported(kind, request):
    path = request.getfixturevalue(kind)
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[0] == str(MATRICES + VECTORS)


def test_nothing_there(tmp_path):
    with pytest.raises(FewbitsError, match="no such file"):
        inspect(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(FewbitsError, match="not a GGUF file"):
        inspect(tmp_path / "notes.txt")


def test_a_gguf_file_of_an_architecture_outside_the_table(tmp_path):
    """Its tensors are shown under their own names; nothing else takes it."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "starcoder2")
    writer.add_uint32("starcoder2.block_count", 1)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 32), np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = inspect(path)
    assert found.architecture == "starcoder2" and found.container == "gguf" and found.tokenizer
    assert {(t.name, t.shape, t.codec) for t in found.tensors} == {("blk.0.attn_q.weight", (4, 32), "F32"),
                                                                   ("token_embd.weight", (2, 32), "Q8_0")}
    assert found.metadata["names"] == "the file's own: there is no table for starcoder2"
    assert found.metadata["starcoder2.block_count"] == 1
    for use in (plan, load):
        with pytest.raises(FewbitsError, match="general.architecture is 'starcoder2'; there are tables for gemma2"):
            use(path)
