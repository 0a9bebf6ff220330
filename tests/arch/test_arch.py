"""The architecture table against Transformers' own models, and the row algebra by hand."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from fewbits import arch
from fewbits.arch import rope, rows
from fewbits.codecs.floats import BF16, F16, F32
from fewbits.qtensor import QTensor
from tests.arch.models import MODELS

SMALL = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7, "num_attention_heads": 4,
         "num_key_value_heads": 2}
CONFIGS = [
    transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    transformers.LlamaConfig(**SMALL, tie_word_embeddings=True, head_dim=16),
    transformers.MistralConfig(**SMALL, sliding_window=None),
    transformers.Qwen2Config(**SMALL),
    transformers.Gemma3TextConfig(**SMALL, head_dim=16, query_pre_attn_scalar=16),
]


def _named(config: transformers.PreTrainedConfig) -> dict:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    state = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {"config": config.to_dict() | {"architectures": [type(model).__name__]}, "state": state}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_the_table_lists_exactly_the_tensors_of_the_model(config):
    model = _named(config)
    family = arch.lookup(model["config"])
    table = arch.tensors(family, model["config"])
    assert {t.hf for t in table} == set(model["state"])
    assert len({t.gguf for t in table}) == len(table)
    for t in table:
        assert (t.layer is None) == ("layers" not in t.hf)
        assert t.role in ("norm", "bias") if len(model["state"][t.hf]) == 1 else t.role in t.gguf


def test_the_table_agrees_with_the_names_of_the_gguf_package():
    import gguf

    for name, id_ in (("llama", gguf.MODEL_ARCH.LLAMA), ("qwen2", gguf.MODEL_ARCH.QWEN2),
                      ("gemma3", gguf.MODEL_ARCH.GEMMA3)):
        family = arch.by_gguf(name)
        names = gguf.get_tensor_name_map(id_, 7)
        config = {**SMALL, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
        for t in arch.tensors(family, config):
            stem, _, kind = t.hf.rpartition(".")
            assert names.get_name(stem) + "." + kind == t.gguf


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "phi3", "gpt2-inner", "gpt_neox", "olmo2"])
def test_names_of_later_families_are_those_of_the_gguf_package(name):
    import gguf

    config = MODELS[name].to_dict()
    family = arch.lookup(config)
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == family.gguf)
    names = gguf.get_tensor_name_map(kind, config.get("num_hidden_layers") or config["n_layer"])
    for t in arch.tensors(family, config):
        stem, _, part = t.hf.rpartition(".")
        assert names.get_name(stem) + "." + part == t.gguf


@pytest.mark.parametrize("name, changes, reason", [
    ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu', gpt2 in GGUF means 'gelu_new'"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is false"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is set"),
    ("gpt_neox", {"attention_bias": False}, "attention_bias is false"),
    ("gpt_neox", {"tie_word_embeddings": True}, "tied to the embedding"),
    ("olmo2", {"tie_word_embeddings": True}, "tied to the embedding"),
    ("olmo2", {"attention_bias": True}, "attention_bias is set"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window is set"),
    ("qwen3", {"attention_bias": True}, "attention_bias is set"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is None: gemma2 in GGUF always caps"),
    ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 100: gemma2 in GGUF means 32"),
    ("gemma2", {"layer_types": ["full_attention"] * 3}, "do not follow 1 sliding to 1 full"),
    ("phi3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'; known here"),
    ("phi3-longrope", {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
     "long_factor has 1 entries for 16 rotated columns"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
])
def test_what_gguf_cannot_say_is_refused_with_the_reason(name, changes, reason):
    config = MODELS[name].to_dict() | changes
    family = arch.lookup(config)
    assert reason in family.refuse(arch.complete(family, config))
    assert family.refuse(arch.complete(family, MODELS[name].to_dict())) is None


def test_phi_3_of_the_first_days_says_the_same():
    """`su` and rope_scaling, the original length beside it."""
    factors = {"long_factor": [1.0, 2.0], "short_factor": [1.0, 1.5]}
    old = {"model_type": "phi3", "hidden_size": 16, "num_attention_heads": 4, "max_position_embeddings": 131072,
           "original_max_position_embeddings": 4096, "rope_theta": 1e4, "rope_scaling": {"type": "su", **factors}}
    family = arch.lookup(old)
    found = family.extra_metadata(arch.complete(family, old))
    assert family.refuse(arch.complete(family, old)) is None
    assert found["rope.scaling.original_context_length"] == ("UINT32", 4096)
    assert found["rope.scaling.attn_factor"][1] == pytest.approx((1 + 5 / 12) ** 0.5)  # ln 32 / ln 4096


def test_lookup():
    assert arch.lookup({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}).name == "llama"
    assert arch.lookup({"model_type": "gemma3_text"}).name == "gemma3"
    assert arch.lookup({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}) is None
    assert arch.lookup({"architectures": ["CodeGenForCausalLM"], "model_type": "codegen"}) is None
    assert arch.by_gguf("bert") is None


# rows ---------------------------------------------------------------------------------------------------------------
def _floats(w: torch.Tensor, codec=F32) -> QTensor:
    return QTensor(codec, tuple(w.shape), {"data": w.to(codec.dtype).view(codec.matrix(tuple(w.shape)))})


def test_rope_permutation_by_hand():
    # two heads of width 6: pairs (i, i + 3) of each head become neighbours
    permuted = rows.RopePermute(2).apply(_floats(torch.arange(12.0).view(12, 1))).dequantize()
    assert permuted.flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@given(heads=st.integers(1, 4), pairs=st.integers(1, 5), columns=st.integers(1, 3), vector=st.booleans())
def test_rope_permutation_is_undone(heads, pairs, columns, vector):
    rows_ = 2 * heads * pairs
    w = torch.randn(rows_) if vector else torch.randn(rows_, columns)
    op = rows.RopePermute(heads)
    there = op.apply(_floats(w))
    assert torch.equal(op.undo(there).dequantize(), w)
    flat = w.view(heads, 2, pairs, -1).swapaxes(1, 2).reshape(w.shape)  # the formula of llama.cpp's converter
    assert torch.equal(there.dequantize(), flat)


def test_fused_rows_by_hand():
    # two heads of q, k and v, two rows each: all of q first, then k, then v
    rows_ = torch.tensor([0, 1, 10, 11, 20, 21, 100, 101, 110, 111, 120, 121.0])
    there = rows.Regroup(2, 3).apply(_floats(rows_))
    assert there.dequantize().tolist() == [0, 1, 100, 101, 10, 11, 110, 111, 20, 21, 120, 121]
    assert torch.equal(rows.Regroup(2, 3).undo(there).dequantize(), rows_)
    with pytest.raises(ValueError, match="12 rows do not divide into 5 heads of 3 parts"):
        rows.Regroup(5, 3).apply(_floats(rows_))


def test_rope_permutation_refuses_odd_heads():
    with pytest.raises(ValueError, match="10 rows do not divide into 4 heads"):
        rows.RopePermute(4).apply(_floats(torch.randn(10, 2)))


@pytest.mark.parametrize("codec", [F32, F16, BF16])
def test_add_one(codec):
    w = (torch.randint(-4096, 4096, (33,)) / 2048).to(codec.dtype)
    there = rows.apply((rows.AddOne(),), _floats(w, codec))
    assert there.codec == F32 == rows.codec((rows.AddOne(),), codec)
    assert torch.equal(there.dequantize(), w.float() + 1)
    assert torch.equal(rows.undo((rows.AddOne(),), there).dequantize(), w.float())


# rope settings ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config, kind, wanted", [
    ({}, "", {"rope_type": "default", "rope_theta": 10000.0}),
    ({"rope_theta": 5e5}, "", {"rope_type": "default", "rope_theta": 5e5}),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, "",
     {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}),
    ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "yarn", "factor": 4.0}}, "",
     {"rope_type": "yarn", "rope_theta": 7.0, "factor": 4.0}),
    ({"rope_theta": 1e6, "rope_local_base_freq": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
     "full_attention", {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}),
    ({"rope_theta": 1e6, "rope_local_base_freq": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
     "sliding_attention", {"rope_type": "default", "rope_theta": 5e3}),
    ({"rope_parameters": {"full_attention": {"rope_theta": 3.0}, "sliding_attention": {"rope_theta": 2.0}}},
     "sliding_attention", {"rope_type": "default", "rope_theta": 2.0}),
    ({}, "full_attention", {"rope_type": "default", "rope_theta": 1e6}),
])
def test_both_spellings_of_rope_settings(config, kind, wanted):
    assert rope.parameters(config, kind) == wanted


def test_unknown_rope_scaling_is_refused_by_name():
    config = SMALL | {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "longrope"}}
    assert "'longrope'" in arch.by_gguf("llama").refuse(config)


@pytest.mark.parametrize("factor, width, theta", [(8.0, 128, 5e5), (32.0, 64, 5e5), (2.0, 96, 1e6)])
def test_llama3_factors_are_those_of_transformers_and_lead_back(factor, width, theta):
    settings = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(hidden_size=width, num_attention_heads=1, rope_parameters=dict(settings))
    with_, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = theta ** (-torch.arange(0, width, 2) / width)
    factors = rope.llama3_factors(settings, width)
    torch.testing.assert_close(plain / with_, torch.tensor(factors), rtol=1e-5, atol=0)
    assert rope.llama3_from_factors(torch.tensor(factors).tolist(), theta) == settings
    with pytest.raises(ValueError):
        rope.llama3_from_factors([1.0, 3.0, 2.0, 5.0, 4.0, 8.0], theta)
