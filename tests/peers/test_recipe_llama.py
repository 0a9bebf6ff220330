"""llama.cpp quantizes small GGUF files of many shapes; `resolve` must name the type of every tensor it wrote."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest

from fewbits import arch
from fewbits.codecs.floats import F32
from fewbits.recipe import Fact, ModelFacts, get, llama

QUANTIZE = """
import ctypes, functools, json, sys
import gguf, llama_cpp
quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(quiet, None)
out = []

@functools.cache
def widths(source):
    shapes = {t.name: t.shape for t in gguf.GGUFReader(source).tensors}  # experts have importances of their own
    return {name: int(s[0]) * (int(s[2]) if len(s) == 3 else 1) for name, s in shapes.items()}

for source, target, ftype, pure, weighted in json.load(sys.stdin):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = ftype, 1, pure
    if weighted:
        data = []
        for name, width in widths(source).items():
            data.append(llama_cpp.llama_model_imatrix_data(
                name=name.encode(), data=(ctypes.c_float * width)(*[1.0] * width), size=width))
        data.append(llama_cpp.llama_model_imatrix_data())
        params.imatrix = (llama_cpp.llama_model_imatrix_data * len(data))(*data)
    rc = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    written = gguf.GGUFReader(target) if rc == 0 else None
    out.append([{t.name: t.tensor_type.name for t in written.tensors},
                int(written.fields["general.file_type"].parts[-1][0])] if written else [None, None])
json.dump(out, sys.stdout)
"""

# model type, hidden, inner, heads, key/value heads, layers, tied
SHAPES = [
    ("llama", 64, 172, 8, 4, 5, True),
    ("llama", 256, 512, 4, 4, 8, False),
    ("llama", 512, 1024, 8, 1, 9, False),
    ("llama", 576, 1536, 9, 3, 30, True),
    ("llama", 640, 768, 8, 2, 3, False),
    ("llama", 768, 256, 12, 3, 16, True),
    ("llama", 256, 256, 8, 1, 80, False),
    ("llama", 256, 256, 8, 8, 80, True),
    ("llama", 80, 176, 4, 2, 11, False),
    ("qwen2", 256, 512, 8, 2, 24, True),
    ("qwen2", 128, 320, 2, 2, 12, False),
    ("qwen2", 256, 256, 8, 8, 80, False),
    ("gemma3_text", 640, 2048, 4, 1, 18, True),
    ("gemma3_text", 512, 768, 8, 4, 12, True),
]
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}


def config_of(kind: str, hidden: int, inner: int, heads: int, kv_heads: int, layers: int, tied: bool) -> dict:
    return {"architectures": [CLASSES[kind]], "model_type": kind, "hidden_size": hidden, "intermediate_size": inner,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "num_hidden_layers": layers,
            "head_dim": hidden // heads, "tie_word_embeddings": tied, "vocab_size": 96, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 512, "rope_theta": 10000.0, "sliding_window": 64, "dtype": "float16"}


def zeros(shape: tuple, dtype: type) -> np.ndarray:
    """Quick to quantize: types depend neither on values nor on the number of rows, once there are two."""
    return np.zeros((*shape[:-2], *(min(2, rows) for rows in shape[-2:-1]), shape[-1]), dtype)


def write_f16(path: Path, config: dict, facts: ModelFacts) -> None:
    family = arch.lookup(config)
    writer = gguf.GGUFWriter(path, family.gguf)
    if family.gguf != "gemma3":
        config = {k: v for k, v in config.items() if k != "sliding_window"}
    for f in family.fields:
        if config.get(f.hf) is not None:
            writer.add_key_value(f"{family.gguf}.{f.key}", config[f.hf], gguf.GGUFValueType[f.type])
    for fact in facts.tensors:
        writer.add_tensor(fact.gguf, zeros(fact.shape, np.float32 if len(fact.shape) == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# GGUF's name of the architecture, hidden, inner, heads, key/value heads, layers, experts, tied: without our tables
BARE = [
    ("llama", 256, 256, 8, 2, 16, 8, False),
    ("llama", 256, 512, 8, 8, 9, 8, True),
    ("llama", 256, 256, 8, 2, 16, 4, False),
    ("llama", 64, 96, 4, 1, 8, 8, False),
    ("qwen3moe", 256, 256, 8, 1, 24, 16, False),
    ("qwen3moe", 128, 96, 4, 4, 8, 8, True),
    ("gpt-oss", 288, 288, 8, 2, 12, 4, False),
    ("falcon", 256, 1024, 8, 1, 33, 0, False),
    ("falcon", 512, 512, 8, 8, 12, 0, True),
]


def bare_model(path: Path, name: str, hidden: int, inner: int, heads: int, kv_heads: int, layers: int, experts: int,
               tied: bool) -> ModelFacts:
    """A file of zeros with the names that llama.cpp gives to mixtures of experts and to Falcon's fused projections."""
    writer = gguf.GGUFWriter(path, name)
    for key, value in (("context_length", 512), ("embedding_length", hidden), ("block_count", layers),
                       ("feed_forward_length", inner), ("attention.head_count", heads), ("vocab_size", 96),
                       ("attention.head_count_kv", kv_heads), ("expert_count", experts), ("expert_used_count", 2),
                       ("expert_feed_forward_length", inner), ("attention.sliding_window", 64)):
        if experts or not key.startswith("expert"):
            writer.add_uint32(f"{name}.{key}", value)
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        writer.add_float32(f"{name}.{key}", 1e-6)
    head = hidden // heads
    parts = {"attn_output.weight": (hidden, hidden)}
    if name == "falcon":
        parts |= {"attn_qkv.weight": (hidden + 2 * kv_heads * head, hidden), "ffn_up.weight": (inner, hidden),
                  "ffn_down.weight": (hidden, inner)}
    else:
        parts |= {f"attn_{k}.weight": (n * head, hidden) for k, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
        parts |= {"ffn_gate_inp.weight": (experts, hidden), "ffn_gate_exps.weight": (experts, inner, hidden),
                  "ffn_up_exps.weight": (experts, inner, hidden), "ffn_down_exps.weight": (experts, hidden, inner),
                  "ffn_up_exps.bias": (experts, inner)}
    shapes = {"token_embd.weight": (96, hidden), "output_norm.weight": (hidden,)}
    shapes |= {} if tied else {"output.weight": (96, hidden)}
    shapes |= {f"blk.{i}.{part}": shape for i in range(layers) for part, shape in parts.items()}
    facts = []
    for tensor, shape in shapes.items():
        kept = len(shape) == 1 or "gate_inp" in tensor or tensor.endswith("bias")
        writer.add_tensor(tensor, zeros(shape, np.float32 if kept else np.float16))
        facts.append(Fact(tensor, shape, F32, "output" if tensor == "output.weight" else "", gguf=tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
              "num_local_experts": experts}
    return ModelFacts(config, tuple(facts), name)


def llama_types(python: str, jobs: list) -> list:
    done = subprocess.run([python, "-c", QUANTIZE], input=json.dumps(jobs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def ours(recipe: str, facts: ModelFacts, weighted: bool) -> dict[str, str]:
    choices = get(recipe, "gguf").resolve(facts, has_importance=weighted)
    return {f.gguf: c.codec.name for f, c in zip(facts.tensors, choices, strict=True)}


@pytest.mark.peer
def test_types_are_llama_cpps(peer, tmp_path):
    python = peer("llama")
    jobs, meant = [], []
    for number, shape in enumerate(SHAPES):
        config = config_of(*shape)
        facts = ModelFacts.from_config(config)
        source = tmp_path / f"{number}.gguf"
        write_f16(source, config, facts)
        for name, weighted in mixes():
            jobs.append([str(source), str(tmp_path / "out.gguf"), llama.MIXES[name].file_type, False, weighted])
            meant.append((shape, name, facts, weighted))
    assert agree(llama_types(python, jobs), meant) > 80_000


@pytest.mark.peer
def test_types_of_experts_and_falcon_are_llama_cpps(peer, tmp_path):
    jobs, meant = [], []
    for number, shape in enumerate(BARE):
        source = tmp_path / f"{number}.gguf"
        facts = bare_model(source, *shape)
        for name, weighted in mixes():
            jobs.append([str(source), str(tmp_path / "out.gguf"), llama.MIXES[name].file_type, False, weighted])
            meant.append((shape, name, facts, weighted))
    assert agree(llama_types(peer("llama"), jobs), meant) > 30_000


def mixes() -> list:
    """Every mix, with and without importances where it has rules; llama.cpp refuses Q2_K_S without."""
    return [(name, weighted) for name, mix in llama.MIXES.items() for weighted in (False, True)
            if (mix.rules or not weighted) and (name != "Q2_K_S" or weighted)]


def agree(found: list, meant: list) -> int:
    """The number of tensors whose types are equal."""
    checked = 0
    for (types, file_type), (shape, name, facts, weighted) in zip(found, meant, strict=True):
        if name == "Q1_0" and types is None:  # llama.cpp has no type to take instead where the width does not divide
            assert ("Q1_0", "F16") in llama.assign(llama.MIXES[name], facts, weighted).values()
            continue
        assert types is not None, f"llama.cpp refused {shape} {name}"
        wanted = {f.gguf: t for f, t in assigned(name, facts, weighted).items()}
        differ = {k: (types[k], wanted[k]) for k in types if types[k] != wanted[k]}
        assert not differ, f"{shape} {name} {weighted}: tensor: (llama.cpp, ours): {differ}"
        assert file_type == get(name, "gguf").file_type
        checked += len(types)
    return checked


def assigned(name: str, facts: ModelFacts, weighted: bool) -> dict:
    """The types before they become codecs: rules are checked for types that cannot be written yet, too."""
    types = llama.assign(llama.MIXES[name], facts, weighted)
    return {f: types.get(f.name, ("F32", "F32"))[1] for f in facts.tensors}


@pytest.mark.peer
def test_pure_types_are_llama_cpps(peer, tmp_path):
    python, jobs, meant = peer("llama"), [], []
    for number, shape in enumerate(SHAPES[:6]):
        config = config_of(*shape)
        facts = ModelFacts.from_config(config)
        source = tmp_path / f"{number}.gguf"
        write_f16(source, config, facts)
        for name, file_type in (("Q4_K", 14), ("Q6_K", 18), ("Q5_0", 8)):
            jobs.append([str(source), str(tmp_path / "out.gguf"), file_type, True, False])
            meant.append((shape, name, facts))
    for (types, _), (shape, name, facts) in zip(llama_types(python, jobs), meant, strict=True):
        assigned = llama.assign(llama.Mix(0, name), facts, False, pure=True)
        wanted = {f.gguf: assigned.get(f.name, ("F32", "F32"))[1] for f in facts.tensors}
        assert types == wanted, f"{shape} {name}"


@pytest.mark.peer
def test_resolve_on_a_real_model(peer, tmp_path, model):
    """The published SmolLM2: the choices of `resolve`, as codecs, beside llama.cpp's types."""
    config = json.loads((model("smollm2-135m") / "config.json").read_text())
    config["vocab_size"] = 96  # its own is nothing but time
    facts = ModelFacts.from_config(config)
    source = tmp_path / "f16.gguf"
    write_f16(source, config, facts)
    names = ("Q4_K_M", "Q6_K", "Q4_0", "Q8_0", "F16")
    jobs = [[str(source), str(tmp_path / "out.gguf"), llama.MIXES[n].file_type, False, False] for n in names]
    for name, (types, _) in zip(names, llama_types(peer("llama"), jobs), strict=True):
        assert ours(name, facts, False) == types
    assert facts.tensors[1].codec != F32
