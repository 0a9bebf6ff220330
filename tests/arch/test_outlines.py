"""Families that stay in Transformers' layouts: roles against Transformers' own modules, quantized and loaded again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers as t

import fewbits
from fewbits import arch, containers
from fewbits.errors import FewbitsError
from fewbits.recipe import ModelFacts, get
from fewbits.recipe.facts import LINEAR
from fewbits.runtime.build import empty_model
from fewbits.runtime.linear import QLinear
from fewbits.runtime.places import Places

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIGHT = {**SMALL, "image_size": 28, "patch_size": 14}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
QWEN_SIGHT = {"hidden_size": 64, "intermediate_size": 128, "depth": 1, "num_heads": 4, "out_hidden_size": 64}

MODELS = {
    "opt": (t.OPTForCausalLM, lambda: t.OPTConfig(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, vocab_size=96,
        max_position_embeddings=64, pad_token_id=1)),
    "whisper": (t.WhisperForConditionalGeneration, lambda: t.WhisperConfig(
        d_model=64, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=64, vocab_size=96, max_source_positions=50, max_target_positions=20,
        pad_token_id=1, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1)),
    "bert": (t.BertForMaskedLM, lambda: t.BertConfig(**SMALL, vocab_size=96)),
    "bert-base": (t.BertModel, lambda: t.BertConfig(**SMALL, vocab_size=96)),
    "vit": (t.ViTForImageClassification, lambda: t.ViTConfig(**SIGHT)),
    "gemma3": (t.Gemma3ForConditionalGeneration, lambda: t.Gemma3Config(
        text_config=t.Gemma3TextConfig(**TEXT, head_dim=16), vision_config=t.SiglipVisionConfig(**SIGHT),
        mm_tokens_per_image=1)),
    "llava": (t.LlavaForConditionalGeneration, lambda: t.LlavaConfig(
        text_config=t.LlamaConfig(**TEXT), vision_config=t.CLIPVisionConfig(**SIGHT))),
    "qwen2.5-vl": (t.Qwen2_5_VLForConditionalGeneration, lambda: t.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE}, vision_config=QWEN_SIGHT)),
    "qwen3-vl": (t.Qwen3VLForConditionalGeneration, lambda: t.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": MROPE},
        vision_config={**QWEN_SIGHT, "deepstack_visual_indexes": [0]})),
}
TOWERS = ("vision", "visual", "multi_modal", "classifier")


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """A random model as Transformers writes it."""
    torch.manual_seed(0)
    kind, config = MODELS[request.param]
    path = tmp_path_factory.mktemp(request.param) / "model"
    kind(config()).save_pretrained(path)
    return path


def test_linear_layers_are_those_of_transformers(saved):
    """Every role on a linear layer is one, and none is forgotten outside of the towers."""
    source = containers.open(saved)
    net = empty_model(source.config)
    head = net.get_output_embeddings() if hasattr(net, "get_output_embeddings") else None
    facts, places = {f.name: f for f in ModelFacts.of(source).tensors}, Places(net, source)
    for entry in source.entries.values():
        place = places.of(entry)
        module, leaf = place.module, place.leaf
        linear = isinstance(module, torch.nn.Linear) and leaf == "weight" and module is not head
        alone = any(part in entry.name for part in TOWERS)
        assert (facts[entry.name].role in LINEAR) == (linear and not alone), entry.name
        assert (facts[entry.name].role == "output") == (module is head and leaf == "weight"), entry.name
        if isinstance(module, torch.nn.Embedding) and not alone:
            assert facts[entry.name].role in ("token_embd", "position_embd", "token_types"), entry.name


def test_quantized_and_loaded_again(saved, tmp_path):
    source = containers.open(saved)
    result = fewbits.quantize(source, tmp_path / "out", "nf4")
    net = fewbits.load(result.path)
    wanted = sum(f.role in LINEAR for f in ModelFacts.of(source).tensors)
    assert sum(isinstance(m, QLinear) for m in net.modules()) == wanted > 0
    back = containers.open(result.path)
    kept = [n for n in source.entries if any(part in n for part in TOWERS)]
    assert all(torch.equal(back.entries[n].load().dequantize(), source.entries[n].load().dequantize()) for n in kept)


def test_gguf_is_refused_with_the_reason(saved):
    source = containers.open(saved)
    with pytest.raises(FewbitsError, match=f"goes to GGUF: {source.architecture}: "):
        get("Q4_K_M").resolve(ModelFacts.of(source))
    reason = containers.by_name("gguf").accepts(source, next(iter(source.entries.values())))
    assert reason == arch.why_not_gguf(source.config)


def test_plans_are_made_without_torch(saved):
    code = ("import sys, fewbits; p = fewbits.plan(sys.argv[1], memory_bytes=10**9, recipes=['nf4', 'f16'])\n"
            "assert all(not r.reason for r in p.rows), p.rows\n"
            "assert not {'torch', 'transformers'} & sys.modules.keys()")
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("config", [{"architectures": 5}, {"architectures": [["x"]], "model_type": {}},
                                    {"model_type": ["opt"]}, {"text_config": {"model_type": []}}, {"text_config": 3}])
def test_odd_configurations_are_of_no_family(config):
    assert arch.lookup(config) is None and arch.outline(config) is None
    assert "GGUF needs a table of names for" in arch.why_not_gguf(config)


def test_names_of_other_ages_have_the_same_roles():
    qwen = arch.outline({"model_type": "qwen2_5_vl"})  # a flat configuration, as before text_config
    for name in ("model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"):
        assert qwen.role(name) == ("ffn_up", 3)
    assert qwen.role("visual.blocks.3.mlp.up_proj.weight") == ("", None)
    llava = arch.outline({"model_type": "llava", "text_config": {"model_type": "mistral"}})
    assert llava.role("language_model.lm_head.weight") == llava.role("lm_head.weight") == ("output", None)
    assert arch.outline({"model_type": "blip-2", "text_config": {"model_type": "gpt2"}}) is None  # held as [in, out]
    assert arch.outline({"model_type": "llama"}) is None
