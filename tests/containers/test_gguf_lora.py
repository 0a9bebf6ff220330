"""LoRA adapters between peft's directories and llama.cpp's files: bytes kept, rows in order, lies refused."""

from __future__ import annotations

import json

import gguf
import pytest
import safetensors.torch
import torch

from fewbits.containers import gguf_file, gguf_lora
from fewbits.containers.gguf_file import Spec, Value
from fewbits.errors import FewbitsError

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 48, "hidden_size": 64,
          "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", "base_model_name_or_path": "org/base"}
ATTENTION, MLP, HEAD = "model.layers.1.self_attn.", "model.layers.0.mlp.", "model.embed_tokens"
SIDES = {ATTENTION + "q_proj": (64, 64), ATTENTION + "k_proj": (32, 64), ATTENTION + "v_proj": (32, 64),
         MLP + "down_proj": (64, 96)}


def pair(module: str, rank: int = 4, dtype=torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    draw, (out, width) = torch.Generator().manual_seed(seed), SIDES[module]
    return {f"base_model.model.{module}.lora_A.weight": torch.randn(rank, width, generator=draw).to(dtype),
            f"base_model.model.{module}.lora_B.weight": torch.randn(out, rank, generator=draw).to(dtype)}


def embedding(rank: int = 4) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(9)
    return {f"base_model.model.{HEAD}.lora_embedding_A": torch.randn(rank, 48, generator=draw),
            f"base_model.model.{HEAD}.lora_embedding_B": torch.randn(64, rank, generator=draw)}


def save(path, tensors, **settings):
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    return path


def everything(rank: int = 4, dtype=torch.float32) -> dict[str, torch.Tensor]:
    return {k: v for i, m in enumerate(SIDES) for k, v in pair(m, rank, dtype, i).items()}


def deltas(tensors, alpha: float = 6) -> dict[str, torch.Tensor]:
    """What peft adds to each weight, by its documentation."""
    found = {}
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            found[name[17:-14] + ".weight"] = alpha / a.shape[0] * b.float() @ a.float()
        if name.endswith("lora_embedding_A"):
            b = tensors[name.replace("_A", "_B")]
            found[name[17:-17] + ".weight"] = alpha / a.shape[0] * (b @ a).T
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_there_and_back_keeps_every_byte(tmp_path, dtype):
    tensors = everything(dtype=dtype) | embedding()
    peft = save(tmp_path / "peft", tensors)
    assert gguf_lora.is_adapter(peft) and not gguf_lora.is_adapter(tmp_path)
    gguf_lora.to_gguf(peft, CONFIG, tmp_path / "a.gguf")
    assert gguf_lora.is_adapter(tmp_path / "a.gguf")
    lora = gguf_lora.to_peft(tmp_path / "a.gguf", CONFIG, tmp_path / "back")
    back = safetensors.torch.load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors.items())
    settings = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["lora_alpha"] == 6 and settings["rank_pattern"] == {}
    assert settings["base_model_name_or_path"] == "org/base"
    assert settings["target_modules"] == sorted([*SIDES, HEAD])
    for name, wanted in deltas(tensors).items():
        assert torch.allclose(lora.pairs[name].delta(), wanted, rtol=1e-5, atol=1e-6), name


def test_the_file_as_the_gguf_package_reads_it(tmp_path):
    tensors = everything() | embedding()
    gguf_lora.to_gguf(save(tmp_path / "peft", tensors), CONFIG, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    values = {k: reader.get_field(k).contents() for k in ("general.architecture", "general.type", "adapter.type",
                                                          "adapter.lora.alpha", "general.base_model.0.name")}
    assert list(values.values()) == ["llama", "adapter", "lora", 6.0, "org/base"]
    found = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    assert len(found) == 10
    # rows of a head: rotary pairs (i, i + 8) of its 16 lie side by side
    b = tensors[f"base_model.model.{ATTENTION}q_proj.lora_B.weight"]
    neighbours = torch.tensor([h * 16 + i + half for h in range(4) for i in range(8) for half in (0, 8)])
    assert torch.equal(found["blk.1.attn_q.weight.lora_b"], b[neighbours])
    assert torch.equal(found["blk.1.attn_q.weight.lora_a"],
                       tensors[f"base_model.model.{ATTENTION}q_proj.lora_A.weight"])
    assert torch.equal(found["blk.1.attn_v.weight.lora_b"],
                       tensors[f"base_model.model.{ATTENTION}v_proj.lora_B.weight"])
    assert torch.equal(found["token_embd.weight.lora_a"], tensors[f"base_model.model.{HEAD}.lora_embedding_A"].T)
    assert torch.equal(found["token_embd.weight.lora_b"], tensors[f"base_model.model.{HEAD}.lora_embedding_B"])


@pytest.mark.parametrize("settings, scales", [
    ({"use_rslora": True}, {ATTENTION + "q_proj": 6 / 2, MLP + "down_proj": 6 / 8**0.5}),
    ({"alpha_pattern": {"down_proj": 16}}, {ATTENTION + "q_proj": 6 / 4, MLP + "down_proj": 2.0}),
    ({}, {ATTENTION + "q_proj": 6 / 4, MLP + "down_proj": 6 / 8}),
])
def test_ranks_and_scales_that_differ_survive_both_ways(tmp_path, settings, scales):
    tensors = pair(ATTENTION + "q_proj") | pair(ATTENTION + "v_proj") | pair(MLP + "down_proj", 8)
    peft = save(tmp_path / "peft", tensors, **settings)
    before = gguf_lora.read_lora(peft, CONFIG)
    between = gguf_lora.to_gguf(peft, CONFIG, tmp_path / "a.gguf")
    after = gguf_lora.to_peft(tmp_path / "a.gguf", CONFIG, tmp_path / "back")
    for module, scale in scales.items():
        name = f"{module}.weight"
        assert before.pairs[name].scale == pytest.approx(scale)
        wanted = before.pairs[name].delta()
        for lora in (between, after):
            assert torch.allclose(lora.pairs[name].delta(), wanted, rtol=1e-5, atol=1e-6), name


def test_without_alpha_the_scale_is_1(tmp_path):
    tensor = torch.randn(2, 64)
    gguf_file.write(tmp_path / "a.gguf", {
        "general.architecture": Value("STRING", "llama"), "general.type": Value("STRING", "adapter"),
        "adapter.type": Value("STRING", "lora")},
        [Spec("blk.0.attn_v.weight.lora_a", (2, 64), "F32"), Spec("blk.0.attn_v.weight.lora_b", (32, 2), "F32")],
        [tensor.view(-1).view(torch.uint8).numpy(), torch.ones(64).view(torch.uint8).numpy()])
    lora = gguf_lora.read_lora(tmp_path / "a.gguf", CONFIG)
    delta = lora.pairs["model.layers.0.self_attn.v_proj.weight"].delta()
    assert torch.allclose(delta, tensor.sum(0).expand(32, 64), atol=1e-6)


V = ATTENTION + "v_proj"


@pytest.mark.parametrize("tensors, settings, message", [
    (pair(V), {"peft_type": "IA3"}, "adapter_config.json: peft_type is 'IA3'"),
    (pair(V), {"use_dora": True}, "use_dora is True"),
    (pair(V), {"bias": "all"}, "bias is 'all'"),
    (pair(V), {"modules_to_save": ["lm_head"]}, "modules_to_save is"),
    (pair(V), {"lora_alpha": "much"}, "no lora_alpha for model.layers.1.self_attn.v_proj"),
    (pair(V), {"lora_alpha": float("nan")}, "the scale of model.layers.1.self_attn.v_proj is nan"),
    (pair(V), {"alpha_pattern": {"(": 1}}, "no lora_alpha for"),
    (pair(V), {"lora_alpha": 0}, "alpha is 0.0"),
    ({k: v for k, v in pair(V).items() if "lora_A" in k}, {}, "v_proj has one half of its LoRA pair"),
    ({**pair(V), "base_model.model.lm_head.weight": torch.ones(48, 64)}, {}, "lm_head.weight: is no half"),
    ({k.replace("layers.1", "layers.2"): v for k, v in pair(V).items()}, {},
     "v_proj.weight, which llama does not have"),
    ({k.replace(V, "lm_head"): v for k, v in pair(V).items()}, {}, "lm_head.weight, which is tied to the embedding"),
    ({k: v[..., :3].contiguous() for k, v in pair(V).items()}, {}, r"do not make \[32, 64\]"),
    ({k: v.long() for k, v in pair(V).items()}, {}, r"I64 .*; a matrix of floats is expected"),
])
def test_what_is_no_plain_lora_of_the_model_is_refused(tmp_path, tensors, settings, message):
    peft = save(tmp_path / "peft", tensors, **settings)
    with pytest.raises(FewbitsError, match=message):
        gguf_lora.to_gguf(peft, CONFIG, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists() and not list(tmp_path.glob(".*"))


KEYS = {"general.architecture": Value("STRING", "llama"), "general.type": Value("STRING", "adapter"),
        "adapter.type": Value("STRING", "lora"), "adapter.lora.alpha": Value("FLOAT32", 8.0)}
A, B = Spec("blk.0.attn_q.weight.lora_a", (2, 64), "F32"), Spec("blk.0.attn_q.weight.lora_b", (64, 2), "F32")


@pytest.mark.parametrize("keys, specs, message", [
    ({"general.type": Value("STRING", "model")}, [A, B], "general.type is 'model'"),
    ({"adapter.type": Value("STRING", "control_vector")}, [A, B], "adapter.type 'control_vector'"),
    ({"general.architecture": Value("STRING", "qwen2")}, [A, B], "an adapter for qwen2, and the base model is llama"),
    ({"adapter.lora.alpha": Value("UINT32", 8)}, [A, B], "adapter.lora.alpha is of type UINT32"),
    ({"adapter.lora.alpha": Value("FLOAT32", float("inf"))}, [A, B], "adapter.lora.alpha is inf"),
    ({}, [A], "blk.0.attn_q.weight has one half"),
    ({}, [A, Spec("blk.0.attn_q.weight.lora_b", (64, 3), "F32")], "have no rank in common"),
    ({}, [A, Spec("blk.0.attn_q.weight.lora_b", (63, 2), "F32")], "63 rows do not divide into 4 heads"),
    ({}, [A, Spec("blk.0.attn_q.weight.lora_b", (2, 64, 2), "F32")], "is no half of a LoRA pair"),
    ({}, [A, Spec("blk.0.attn_q.weight", (64, 64), "F32")], "'blk.0.attn_q.weight' .* is no half"),
    ({}, [A, Spec("blk.9.attn_q.weight.lora_b", (64, 2), "F32")], "'blk.9.attn_q.weight.lora_b' .* is no half"),
    ({}, [A, Spec("blk.0.attn_q.weight.lora_b", (64, 2), "I8")], "I8, which is not a weight type"),
])
def test_files_that_are_no_such_adapter_are_refused(tmp_path, keys, specs, message):
    import numpy as np

    gguf_file.write(tmp_path / "a.gguf", KEYS | keys, specs, [np.zeros(s.nbytes, np.uint8) for s in specs])
    with pytest.raises(FewbitsError, match=message) as error:
        gguf_lora.read_lora(tmp_path / "a.gguf", CONFIG)
    assert "a.gguf" in str(error.value)
