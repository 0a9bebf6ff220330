"""GGUF files of whole models: every architecture there and back, against transformers' own GGUF loading."""

from __future__ import annotations

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers

from fewbits import arch, codecs
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.floats import BF16, F16, F32
from fewbits.containers import base, gguf_file
from fewbits.containers.gguf import Gguf
from fewbits.containers.gguf_file import Spec, Value
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor

GGUF = Gguf()
SMALL = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
    "llama-bias": transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama3": transformers.LlamaConfig(**SMALL, head_dim=64, rope_parameters=LLAMA3),
    "yarn": transformers.LlamaConfig(**SMALL, rope_parameters={
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}),
    "mistral": transformers.MistralConfig(**SMALL, sliding_window=None, head_dim=32),
    "qwen2": transformers.Qwen2Config(**SMALL, rope_parameters={
        "rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}),
    "gemma3": transformers.Gemma3TextConfig(**(SMALL | {"num_hidden_layers": 7}), head_dim=32, sliding_window=16,
                                            query_pre_attn_scalar=32, final_logit_softcapping=30.0),
}


def tiny(config: transformers.PreTrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model whose norms are multiples of 2^-10, so that adding one to them is exact."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-1024, 1024, p.shape) / 1024 if p.ndim == 1 else torch.randn_like(p) * 0.2)
    return model.eval()


def checkpoint(model: transformers.PreTrainedModel, path, codec=F32) -> Checkpoint:
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]

    def entry(name: str, w: torch.Tensor) -> Entry:
        kind, shape = codec if w.ndim > 1 else F32, tuple(w.shape)
        planes = {"data": w.to(kind.dtype).view(kind.matrix(shape))}
        return Entry(name, shape, kind, lambda: QTensor(kind, shape, planes))

    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return Checkpoint(path / "source", "transformers", config, {n: entry(n, w) for n, w in state.items()})


def loaded(c: Checkpoint) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(**{k: v for k, v in c.config.items() if k != "dtype"})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    found = model.load_state_dict({n: e.load().dequantize() for n, e in c.entries.items()}, strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_comes_back_bit_for_bit_and_computes_the_same(name, tmp_path):
    model = tiny(CONFIGS[name])
    source = checkpoint(model, tmp_path)
    back = base.write(GGUF, tmp_path / "model.gguf", source)
    assert back.entries.keys() == source.entries.keys()
    for key, entry in source.entries.items():
        assert torch.equal(back.entries[key].load().dequantize(), entry.load().dequantize()), key
    ids = torch.randint(0, SMALL["vocab_size"], (2, 40))
    with torch.no_grad():
        assert torch.allclose(loaded(back)(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    again = base.write(GGUF, tmp_path / "again.gguf", back)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()
    assert again.config == back.config


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_transformers_own_loading_gives_the_same_tensors(name, tmp_path):
    model = tiny(CONFIGS[name])
    source = checkpoint(model, tmp_path)
    # transformers reads no rope scaling of GGUF, and needs a tokenizer to count its tokens
    base.write(GGUF, tmp_path / "model.gguf", source)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    for key, w in theirs.state_dict().items():
        if key in source.entries:
            assert torch.equal(w, source.entries[key].load().dequantize()), key


@pytest.mark.parametrize("codec, kind", [(F16, "F16"), (BF16, "BF16")])
def test_matrices_keep_their_type_and_vectors_are_float32(codec, kind, tmp_path):
    back = base.write(GGUF, tmp_path / "m.gguf", checkpoint(tiny(CONFIGS["llama"]), tmp_path, codec))
    types = {len(t.shape): t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types == {1: "F32", 2: kind}
    assert back.config["dtype"] == codec.DTYPES[kind]
    assert back.facts["file_type"] == {"F16": 1, "BF16": 32}[kind]


def quantized(source: Checkpoint, kind: str) -> Checkpoint:
    """The same with every matrix quantized by the gguf package."""
    codec = codecs.get(kind)
    entries = dict(source.entries)
    for name, entry in source.entries.items():
        if len(entry.shape) == 2:
            blocks = gguf.quants.quantize(entry.load().dequantize().numpy(), gguf.GGMLQuantizationType[kind])
            planes = {"blocks": torch.from_numpy(blocks.view(np.uint8))}
            entries[name] = entry.as_(codec=codec, load=lambda s=entry.shape, p=planes: QTensor(codec, s, p))
    return Checkpoint(source.path, source.container, source.config, entries, source.files, source.facts)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_packed_rows_are_moved_and_never_decoded(kind, tmp_path, monkeypatch):
    source = quantized(checkpoint(tiny(CONFIGS["llama"]), tmp_path), kind)
    monkeypatch.setattr(base, "compare", lambda *a: None)  # the only step that may decode

    def decoded(self, *a):
        raise AssertionError("decoded")

    with monkeypatch.context() as patch:
        patch.setattr(type(codecs.get(kind)), "unpack", decoded)
        back = base.write(GGUF, tmp_path / "m.gguf", source)
        name = "model.layers.1.self_attn.q_proj.weight"
        assert torch.equal(back.entries[name].load().planes["blocks"], source.entries[name].load().planes["blocks"])
    stored = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.1.attn_q.weight")
    values = gguf.quants.dequantize(stored.data, stored.tensor_type)
    w = source.entries[name].load().dequantize().numpy()
    assert np.array_equal(values, w.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(w.shape))


def test_norms_of_gemma_lose_no_more_than_float32_rounds(tmp_path):
    model = tiny(CONFIGS["gemma3"])
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.randn(64) * 1e-6)
    back = base.write(GGUF, tmp_path / "m.gguf", checkpoint(model, tmp_path))
    norm = back.entries["model.norm.weight"].load().dequantize()
    assert (norm - model.model.norm.weight).abs().max() <= 2**-24


def test_metadata_of_the_file_is_kept_with_its_types(tmp_path):
    base.write(GGUF, tmp_path / "a.gguf", checkpoint(tiny(CONFIGS["llama"]), tmp_path))
    file = gguf_file.read(tmp_path / "a.gguf")
    own = {"general.author": Value("STRING", "me"), "x.numbers": Value("ARRAY", np.array([1, -2], "<i2"), "INT16"),
           "general.alignment": Value("UINT32", 64), "x.flag": Value("BOOL", False),
           "llama.block_count": Value("UINT64", 2)}
    gguf_file.write(tmp_path / "b.gguf", file.metadata | own, list(file.tensors.values()),
                    (file.data(s) for s in file.tensors.values()))
    base.write(GGUF, tmp_path / "c.gguf", GGUF.read(tmp_path / "b.gguf"))
    found = gguf_file.read(tmp_path / "c.gguf").metadata
    for key in own.keys() - {"general.alignment"}:
        assert (found[key].type, found[key].items) == (own[key].type, own[key].items)
        assert np.array_equal(found[key].value, own[key].value)
    assert "general.alignment" not in found


def test_the_recipe_names_the_file_type(tmp_path):
    source = checkpoint(tiny(CONFIGS["llama"]), tmp_path)
    source.facts["file_type"] = 15
    assert base.write(GGUF, tmp_path / "m.gguf", source).facts["file_type"] == 15


def test_a_head_beside_tied_embeddings_is_kept(tmp_path):
    model = tiny(CONFIGS["llama"])
    source = checkpoint(model, tmp_path)
    source.config["tie_word_embeddings"] = True
    back = base.write(GGUF, tmp_path / "m.gguf", source)
    assert not back.config["tie_word_embeddings"]
    assert torch.equal(back.entries["lm_head.weight"].load().dequantize(), model.lm_head.weight)


# refusals -----------------------------------------------------------------------------------------------------------
def _refused(source: Checkpoint, tmp_path, message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        base.write(GGUF, tmp_path / "m.gguf", source)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change, message", [
    ({"architectures": ["CodeGenForCausalLM"]}, "table of names for CodeGenForCausalLM"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"sliding_window": 16}, "sliding_window is 16"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
    ({"num_hidden_layers": 1}, r"model.layers.1.*no tensor of that name"),
    ({"num_hidden_layers": 3}, "model.layers.2.* is missing"),
    ({"intermediate_size": None}, "config.json has intermediate_size = None"),
])
def test_what_gguf_cannot_say_is_refused(change, message, tmp_path):
    source = checkpoint(tiny(CONFIGS["llama"]), tmp_path)
    source.config = source.config | change
    _refused(source, tmp_path, message)


def test_other_families_of_codecs_are_refused(tmp_path):
    source = checkpoint(tiny(CONFIGS["llama"]), tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    source.entries[name] = source.entries[name].as_(codec=codecs.get("nf4"))
    _refused(source, tmp_path, "cannot hold model.layers.0.mlp.up_proj.weight")


def _rewritten(tmp_path, metadata=None, drop=(), specs=None):
    """A file with some of its header changed."""
    base.write(GGUF, tmp_path / "a.gguf", checkpoint(tiny(CONFIGS["llama"]), tmp_path))
    file = gguf_file.read(tmp_path / "a.gguf")
    kept = {k: v for k, v in (file.metadata | (metadata or {})).items() if k not in drop}
    tensors = {n: s for n, s in file.tensors.items() if n not in drop}
    new = [(specs or {}).get(n, s) for n, s in tensors.items()]
    gguf_file.write(tmp_path / "b.gguf", kept, new,
                    (np.resize(file.data(s), n.nbytes) for s, n in zip(tensors.values(), new, strict=True)))
    return tmp_path / "b.gguf"


@pytest.mark.parametrize("change, message", [
    ({"metadata": {"general.architecture": Value("STRING", "mamba")}}, "general.architecture is 'mamba'"),
    ({"metadata": {"general.architecture": Value("UINT32", 3)}}, "general.architecture is of type UINT32"),
    ({"drop": ["general.architecture"]}, "general.architecture is None"),
    ({"metadata": {"split.count": Value("UINT16", 3)}}, "file 1 of the 3 of a split model"),
    ({"drop": ["llama.embedding_length"]}, "llama.embedding_length is missing"),
    ({"metadata": {"llama.block_count": Value("STRING", "2")}}, "llama.block_count is of type STRING"),
    ({"metadata": {"llama.block_count": Value("UINT32", 10**6)}}, "block_count is 1000000"),
    ({"metadata": {"llama.attention.head_count": Value("UINT32", 0)}}, "num_attention_heads is 0"),
    ({"metadata": {"llama.rope.scaling.type": Value("STRING", "odd")}}, "rope.scaling.type is 'odd'"),
    ({"drop": ["token_embd.weight"]}, "'token_embd.weight' is missing"),
    ({"drop": ["blk.1.attn_q.weight"]}, "'blk.1.attn_q.weight' is missing"),
    ({"specs": {"blk.1.attn_q.weight": Spec("blk.1.odd", (64, 64), "F32")}}, "'blk.1.odd' has no place in llama"),
    ({"specs": {"blk.1.attn_q.weight": Spec("blk.1.attn_q.weight", (64, 64), "I32")}}, "I32, which is not a weight"),
])
def test_files_that_are_no_such_model_are_refused(change, message, tmp_path):
    path = _rewritten(tmp_path, **change)
    with pytest.raises(FewbitsError, match=message) as error:
        GGUF.read(path)
    assert "b.gguf" in str(error.value)


@pytest.mark.parametrize("name, shape", [("blk.0.attn_q.weight", (6, 64)), ("token_embd.weight", (48, 32)),
                                         ("blk.1.ffn_norm.weight", (1, 64)), ("output_norm.weight", (65,))])
def test_shapes_that_do_not_follow_from_the_metadata_are_refused(name, shape, tmp_path):
    path = _rewritten(tmp_path, specs={name: Spec(name, shape, "F32")})
    with pytest.raises(FewbitsError, match=f"{name}' has the shape .{', '.join(map(str, shape))}.; the metadata make"):
        GGUF.read(path)


def test_a_vocabulary_of_another_size_than_the_embedding_is_refused(tmp_path):
    words = Value("ARRAY", ["a", "b"], "STRING")
    path = _rewritten(tmp_path, metadata={"tokenizer.ggml.model": Value("STRING", "llama"),
                                          "tokenizer.ggml.tokens": words})
    with pytest.raises(FewbitsError, match="the embedding has 48 rows, for 2 tokens"):
        GGUF.read(path)


def test_an_adapter_is_no_model(tmp_path):
    path = _rewritten(tmp_path, metadata={"general.type": Value("STRING", "adapter")})
    with pytest.raises(FewbitsError, match="is a LoRA adapter, not a model"):
        GGUF.read(path)


def test_a_header_is_read_without_torch_and_transformers(tmp_path):
    base.write(GGUF, tmp_path / "m.gguf", checkpoint(tiny(CONFIGS["gemma3"]), tmp_path))
    code = ("import sys; from pathlib import Path; from fewbits.containers.gguf import Gguf\n"
            f"c = Gguf().read(Path({str(tmp_path / 'm.gguf')!r})); c.nbytes, c.parameters\n"
            "assert not {'torch', 'transformers', 'tokenizers'} & sys.modules.keys()")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct.Q4_1.gguf",
                                  pytest.param("gemma-3-270m.Q4_K_M.gguf", marks=pytest.mark.slow)])
def test_published_files_come_back_with_the_same_metadata_and_bytes(name, model, tmp_path):
    path = model(name)
    source = GGUF.read(path)
    assert json.loads(source.files["tokenizer.json"])["model"]["type"] == "BPE"
    base.write(GGUF, tmp_path / "m.gguf", source)
    a, b = gguf_file.read(path), gguf_file.read(tmp_path / "m.gguf")
    assert a.metadata.keys() == b.metadata.keys()
    for key, value in a.metadata.items():
        assert (value.type, value.items) == (b.metadata[key].type, b.metadata[key].items)
        assert list(value.value) == list(b.metadata[key].value) if value.items else value == b.metadata[key], key
    for tensor in a.tensors.values():
        assert np.array_equal(a.data(tensor), b.data(b.tensors[tensor.name]))
    assert arch.by_gguf(a.metadata["general.architecture"].value).architectures[0] == source.architecture
