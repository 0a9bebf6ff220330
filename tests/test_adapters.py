"""Adapters of any model in their checkpoints: the sums are those that peft itself computes with."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers

from fewbits import adapters, containers
from fewbits.codecs.floats import BF16, F32
from fewbits.containers.base import write
from fewbits.errors import FewbitsError
from fewbits.quantizing import quantize

SIZES = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
IDS = {"input_ids": torch.arange(2, 20)[None]}
SOUND = {"input_features": torch.linspace(-1, 1, 8 * 40).view(1, 8, 40), "decoder_input_ids": IDS["input_ids"]}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 28 * 28).view(1, 1, 28, 28)}


def llama(**settings):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | settings))


def gpt2(**settings):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=48, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0, **settings))


def imagegpt():  # layers of the Conv1D kind, in a model that the table does not have
    return transformers.ImageGPTForImageClassification(transformers.ImageGPTConfig(
        vocab_size=48, n_embd=32, n_layer=2, n_head=2, n_positions=32, num_labels=3))


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32))


def whisper():
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(
        vocab_size=48, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20,
        max_target_positions=32, num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None))


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3))


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7,
        num_channels=1, num_labels=5))


def adapt(net, folder: Path, **settings) -> peft.PeftModel:
    """A peft model with random numbers in all that it trains, saved with its base."""
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.2)
    net.eval().save_pretrained(folder / "base")
    model = peft.get_peft_model(net, peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | settings)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "modules_to_save" not in name:
            parameter.data.add_(torch.randn(parameter.shape) * 0.2)
        elif parameter.requires_grad:
            parameter.data.mul_(0.7)
    model.save_pretrained(folder / "adapter")
    return model


def outputs(net, inputs) -> torch.Tensor:
    with torch.no_grad():
        return net(**inputs)[0]


CASES = {
    "linear layers": (llama, IDS, {"target_modules": "all-linear"}),
    "ranks and scales by pattern": (llama, IDS, {
        "target_modules": ["q_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"down_proj": 7},
        "alpha_pattern": {"layers.1.mlp.down_proj": 11}}),
    "DoRA": (llama, IDS, {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "all biases": (lambda: llama(attention_bias=True), IDS, {"target_modules": ["q_proj"], "bias": "all"}),
    "a bias of the pair's own": (lambda: llama(attention_bias=True), IDS, {
        "target_modules": ["q_proj"], "lora_bias": True}),
    "norms trained in full": (llama, IDS, {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "a tied embedding": (lambda: llama(tie_word_embeddings=True), IDS, {
        "target_modules": ["q_proj", "embed_tokens"]}),
    "a tied embedding, DoRA": (lambda: llama(tie_word_embeddings=True), IDS, {
        "target_modules": ["embed_tokens"], "use_dora": True}),
    "a tied head": (lambda: llama(tie_word_embeddings=True), IDS, {"target_modules": ["q_proj", "lm_head"]}),
    "a tied head trained in full": (lambda: llama(tie_word_embeddings=True), IDS, {
        "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "GPT-2": (gpt2, IDS, {"target_modules": ["c_attn", "c_proj", "wpe"]}),
    "GPT-2 DoRA": (gpt2, IDS, {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
    "GPT-2 layers trained in full": (gpt2, IDS, {"target_modules": ["c_attn"], "modules_to_save": ["c_fc"]}),
    "Conv1D": (imagegpt, IDS, {"target_modules": ["c_attn", "c_fc"], "modules_to_save": ["score"]}),
    "Whisper": (whisper, SOUND, {"target_modules": ["q_proj", "fc1"]}),
    "BERT": (bert, IDS, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "ViT, its convolution and its head": (vit, PIXELS, {
        "target_modules": ["query", "fc1", "projection"], "modules_to_save": ["classifier"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_computes_what_peft_does(case, tmp_path):
    make, inputs, settings = CASES[case]
    torch.manual_seed(0)
    tuned = adapt(make(), tmp_path, **settings)
    base = containers.open(tmp_path / "base")
    merged, notes = adapters.applied(base, adapters.read(tmp_path / "adapter", base))
    assert bool(notes) == case.startswith("a tied")
    write(containers.by_name("transformers"), tmp_path / "merged", merged)
    kind = type(tuned.get_base_model())
    back, before = (kind.from_pretrained(tmp_path / name).eval() for name in ("merged", "base"))
    found, wanted = outputs(back, inputs), outputs(tuned, inputs)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4), float((found - wanted).abs().max())
    assert not torch.allclose(found, outputs(before, inputs), rtol=1e-2, atol=1e-2)


def test_one_tensor_stays_one_where_both_uses_change_alike(tmp_path):
    torch.manual_seed(0)
    net = llama(tie_word_embeddings=True)
    tuned = adapt(net, tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    base = containers.open(tmp_path / "base")
    merged, notes = adapters.applied(base, adapters.read(tmp_path / "adapter", base))
    assert not notes and merged.entries.keys() == base.entries.keys() and merged.config["tie_word_embeddings"]
    write(containers.by_name("transformers"), tmp_path / "merged", merged)
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(outputs(back, IDS), outputs(tuned, IDS), rtol=1e-4, atol=1e-4)


def test_an_expert_of_a_stack(tmp_path):
    """Adapters of the time when each expert was a module of its own."""
    torch.manual_seed(0)
    adapt(mixtral(), tmp_path, target_modules=["q_proj"])
    module = "model.layers.1.block_sparse_moe.experts.2.w2"
    a, b = torch.randn(4, 48), torch.randn(32, 4)
    edited(tmp_path / "adapter", {}, lambda t: t | {f"base_model.model.{module}.lora_A.weight": a,
                                                    f"base_model.model.{module}.lora_B.weight": b})
    base = containers.open(tmp_path / "base")
    merged, _ = adapters.applied(base, adapters.read(tmp_path / "adapter", base))
    assert merged.entries.keys() == base.entries.keys()
    stack = "model.layers.1.block_sparse_moe.experts.w2.weight"
    change = merged.entries[stack].load().dequantize() - base.entries[stack].load().dequantize()
    assert not change[:2].any() and torch.allclose(change[2], 1.5 * b @ a, atol=1e-5)


@pytest.mark.parametrize("recipe, make", [("nf4", llama), ("Q8_0", llama), ("nf4", imagegpt), ("nf4", gpt2)])
def test_packed_weights_are_decoded_first(recipe, make, tmp_path):
    torch.manual_seed(0)
    adapt(make(), tmp_path, target_modules="all-linear" if make is llama else ["c_attn"])
    out = tmp_path / ("q.gguf" if recipe == "Q8_0" else "q")
    quantize(tmp_path / "base", out, recipe, overrides=["*c_attn*=nf4"] if make is imagegpt else None,
             calibration="none", container="fewbits" if make is imagegpt else None)
    base = containers.open(out)
    adapter = adapters.read(tmp_path / "adapter", base)
    merged, _ = adapters.applied(base, adapter, F32)
    assert all(e.codec.family == "float" for e in merged.entries.values())
    lying = make is imagegpt
    for name, change in adapter.changes.items():
        before, delta = base.entries[name].load().dequantize(), change.pair.delta()
        wanted = (before + delta).T if lying else before + delta
        assert torch.equal(merged.entries[name].load().dequantize(), wanted), name
    write(containers.by_name("transformers"), tmp_path / "merged", merged)
    kind = type(make())
    assert outputs(kind.from_pretrained(tmp_path / "merged").eval(), IDS).isfinite().all()


def test_float_types(tmp_path):
    torch.manual_seed(0)
    adapt(llama(), tmp_path, target_modules=["q_proj"])
    base = containers.open(tmp_path / "base")
    adapter = adapters.read(tmp_path / "adapter", base)
    name = "model.layers.0.self_attn.q_proj.weight"
    merged, _ = adapters.applied(base, adapter, BF16)
    whole, _ = adapters.applied(base, adapter)
    assert whole.entries[name].codec == F32 and merged.entries[name].codec == BF16
    assert merged.entries["model.norm.weight"].codec == F32  # not what the adapter is about
    assert torch.equal(merged.entries[name].load().dequantize(),
                       whole.entries[name].load().dequantize().bfloat16().float())


def test_names_without_the_prefix_of_the_model_with_a_head(tmp_path):
    """An adapter trained on the bare model belongs to the same tensors."""
    torch.manual_seed(0)
    adapt(llama(), tmp_path, target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({k.replace("model.model.", "model."): v for k, v in tensors.items()}, file)
    base = containers.open(tmp_path / "base")
    merged, _ = adapters.applied(base, adapters.read(tmp_path / "adapter", base))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(merged.entries[name].load().dequantize(), base.entries[name].load().dequantize())


Q = "model.layers.0.self_attn.q_proj"


def edited(folder: Path, settings: dict, change) -> None:
    config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file)


def same(tensors):
    return tensors


@pytest.mark.parametrize("settings, change, message", [
    ({"init_lora_weights": "pissa"}, same, "init_lora_weights is 'pissa'"),
    ({"trainable_token_indices": [1]}, same, "trainable_token_indices is"),
    ({"target_parameters": ["mlp.experts.down_proj"]}, same, "target_parameters is"),
    ({"peft_type": "LOHA"}, same, "peft_type is 'LOHA'"),
    ({}, lambda t: {k.replace("layers.0", "layers.7"): v for k, v in t.items()}, "layers.7.self_attn.q_proj.weight"),
    ({}, lambda t: {k: v[..., :3].contiguous() if "lora_A" in k else v for k, v in t.items()},
     rf"{Q}.weight: A and B of rank 4 make \[32, 3\], and .* has \[32, 32\]"),
    ({}, lambda t: {k: v[..., :3].contiguous() if "lora_B" in k else v for k, v in t.items()},
     "have no rank in common"),
    ({}, lambda t: {k: v for k, v in t.items() if "lora_A" in k}, "has one half of its LoRA pair"),
    ({}, lambda t: t | {f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(3)}, "magnitudes .* do not fit"),
    ({}, lambda t: t | {f"base_model.model.{Q}.lora_E": torch.ones(3)}, "is no half of a LoRA pair"),
    ({}, lambda t: t | {"base_model.model.model.norm.weight": torch.ones(3)}, r"model.norm.weight: \[3\], and"),
    ({}, lambda t: {}, "changes nothing"),
])
def test_what_is_no_adapter_of_the_model_is_refused(settings, change, message, tmp_path):
    torch.manual_seed(0)
    adapt(llama(), tmp_path, target_modules=["q_proj"])
    edited(tmp_path / "adapter", settings, change)
    base = containers.open(tmp_path / "base")
    with pytest.raises(FewbitsError, match=message):
        adapters.applied(base, adapters.read(tmp_path / "adapter", base))


@pytest.mark.parametrize("value, message", [(float("nan"), "would hold NaN"), (1e6, "float16 ends at 65504")])
def test_sums_that_a_file_cannot_hold(value, message, tmp_path):
    torch.manual_seed(0)
    adapt(llama(), tmp_path, target_modules=["q_proj"])
    edited(tmp_path / "adapter", {}, lambda t: {k: v * value for k, v in t.items()})
    base = containers.open(tmp_path / "base")
    merged, _ = adapters.applied(base, adapters.read(tmp_path / "adapter", base), adapters.F16)
    with pytest.raises(FewbitsError, match=message):
        merged.entries[f"{Q}.weight"].load()


def test_a_directory_that_is_no_adapter(tmp_path):
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    with pytest.raises(FewbitsError, match="base: no adapter"):
        adapters.read(tmp_path / "base", containers.open(tmp_path / "base"))
