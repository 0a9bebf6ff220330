from __future__ import annotations

import json

import pytest

from fewbits import codecs
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs import decode_only
from fewbits.codecs.floats import BF16, F16, F32
from fewbits.errors import FewbitsError
from fewbits.recipe import Fact, ModelFacts, get, llama
from fewbits.recipe.llama import fit_width, more_bits

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024,
         "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 16, "vocab_size": 1000,
         "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "float16"}
BERT = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 32, "intermediate_size": 64,
        "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 50, "max_position_embeddings": 16,
        "type_vocab_size": 2}
GPT1 = {"architectures": ["OpenAIGPTLMHeadModel"], "model_type": "openai-gpt", "n_embd": 32, "n_layer": 1, "n_head": 2,
        "vocab_size": 50, "n_positions": 16, "n_ctx": 16}


def facts(**changes) -> ModelFacts:
    return ModelFacts.from_config(LLAMA | changes)


def types(recipe: str, facts: ModelFacts, **options) -> dict[str, str]:
    return {f.gguf or c.name: c.codec.name for f, c in zip(facts.tensors, get(recipe).resolve(facts, **options),
                                                          strict=True)}


# the rules of llama.cpp, by hand --------------------------------------------------------------------------------------
def test_more_bits_of_16_layers():
    layers = [i for i in range(16) if more_bits(llama.Place("ffn_down", i, 16, facts(), False))]
    assert layers == [0, 1, 4, 7, 10, 13, 14, 15]  # the first eighth, the last, and every third between


def test_q4_k_m_by_hand():
    got = types("Q4_K_M", facts())
    assert got["token_embd.weight"] == "Q4_K" and got["output.weight"] == "Q6_K" and got["output_norm.weight"] == "F32"
    assert got["blk.0.attn_v.weight"] == got["blk.4.ffn_down.weight"] == "Q6_K"
    assert got["blk.2.attn_v.weight"] == got["blk.3.ffn_down.weight"] == got["blk.0.attn_q.weight"] == "Q4_K"
    assert types("Q4_K_M", facts(tie_word_embeddings=True))["token_embd.weight"] == "Q6_K"


@pytest.mark.parametrize(("wanted", "columns", "taken"), [
    ("Q4_K", 576, "Q5_0"), ("Q5_K", 576, "Q5_1"), ("Q6_K", 576, "Q8_0"), ("Q6_K", 172, "F16"), ("Q8_0", 48, "F16"),
    ("Q4_0", 64, "Q4_0"), ("Q4_K", 768, "Q4_K"), ("F16", 7, "F16")])
def test_types_by_width(wanted, columns, taken):
    assert fit_width(wanted, columns) == taken


def test_a_fallback_is_reported_with_its_cost():
    config = LLAMA | {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    choice = next(c for c in get("Q4_K_M").resolve(ModelFacts.from_config(config)) if "layers.2.self_attn.q" in c.name)
    assert choice.codec == codecs.get("Q5_0") and choice.wanted == codecs.get("Q4_K")
    assert choice.note == "Q4_K does not divide 576: Q5_0, +1.00 bits"


@pytest.mark.parametrize("name", decode_only.TYPES)
def test_types_that_are_only_read_are_refused_with_the_nearest(name):
    with pytest.raises(FewbitsError, match=f"{name} is read and not written here") as error:
        get(name)
    nearest = get(error.value.hint.split()[-1])
    assert len(nearest.resolve(facts())) == len(facts().tensors)


def test_mixes_that_llama_cpp_has_and_we_do_not_are_refused_with_the_nearest():
    from gguf.constants import LlamaFileType

    theirs = {name.removeprefix("MOSTLY_") for name in LlamaFileType.__members__ if name.startswith("MOSTLY_")}
    assert theirs - llama.MIXES.keys() <= llama.UNWRITTEN.keys() | {"Q4_1_SOME_F16"}
    with pytest.raises(FewbitsError, match="IQ3_M is read") as error:
        get("iq3_m")
    assert error.value.hint == "the nearest that is written: Q3_K_M"


def test_q2_k_and_q3_k_m_by_hand():
    four, two = facts(), facts(num_key_value_heads=4)  # query heads to a key/value head
    assert types("Q2_K", four)["blk.3.attn_v.weight"] == "Q4_K" and types("Q2_K", two)["blk.3.attn_v.weight"] == "Q3_K"
    got = types("Q3_K_M", facts())
    assert [got[f"blk.{i}.attn_v.weight"] for i in range(3)] == ["Q5_K", "Q5_K", "Q4_K"]
    assert [got[f"blk.{i}.ffn_down.weight"] for i in range(2)] == ["Q5_K", "Q4_K"]
    assert got["blk.0.attn_output.weight"] == "Q4_K" and got["blk.0.attn_q.weight"] == "Q3_K"


def test_mxfp4_goes_to_experts_alone():
    stack = Fact("experts", (4, 64, 64), F32, gguf="blk.0.ffn_up_exps.weight")
    other = Fact("attention", (64, 64), F32, gguf="blk.0.attn_q.weight")
    router = Fact("router", (4, 64), F32, gguf="blk.0.ffn_gate_inp.weight")
    model = ModelFacts(LLAMA | {"num_local_experts": 4, "num_hidden_layers": 1}, (stack, other, router), "qwen3moe")
    assert [c.codec.name for c in get("MXFP4_MOE").resolve(model)] == ["MXFP4", "Q8_0", "F32"]


def test_importances_protect_the_first_down_projections():
    got, plain = types("Q4_0", facts(), has_importance=True), types("Q4_0", facts())
    assert {k: got[k] for k in got if got[k] != plain[k]} == {f"blk.{i}.ffn_down.weight": "Q4_1" for i in (0, 1)}


def test_70b_and_8_experts():
    big = facts(num_hidden_layers=80, num_attention_heads=8, num_key_value_heads=1)
    got = llama.assign(llama.MIXES["Q4_K_M"], big, False)
    assert {got[f"model.layers.{i}.self_attn.v_proj.weight"][0] for i in range(80)} == {"Q5_K", "Q6_K"}
    eight = llama.assign(llama.MIXES["Q4_K_M"], facts(num_local_experts=8), False)
    assert eight["model.layers.3.self_attn.k_proj.weight"] == ("Q8_0", "Q8_0")
    assert eight["model.layers.3.self_attn.o_proj.weight"] == ("Q5_K", "Q5_K")


def test_a_matrix_of_one_row_counts_as_a_vector():
    one = facts(hidden_size=64, num_attention_heads=64, num_key_value_heads=1, head_dim=1)
    assert types("Q8_0", one)["blk.0.attn_k.weight"] == "F32"


@pytest.mark.parametrize("name", sorted(llama.MIXES))
def test_every_mix_has_the_number_of_its_file_type(name):
    from gguf.constants import LlamaFileType

    found = LlamaFileType(get(name, "gguf").file_type).name
    assert found in (f"MOSTLY_{name}", f"ALL_{name}")


# recipes by name ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "container"), [
    ("Q4_K_M", "gguf"), ("q4_k_m", "gguf"), ("Q4_K", "gguf"), ("nf4", "bitsandbytes"), ("nf4-dq", "bitsandbytes"),
    ("nf4-b128", "bitsandbytes"), ("fp4", "bitsandbytes"), ("int8", "bitsandbytes"), ("int4-g128", "gptq"),
    ("int3-g32-asym", "gptq"), ("f16", "transformers"), ("bf16", "transformers"), ("F32", "transformers")])
def test_recipes_and_their_containers(name, container):
    recipe = get(name)
    assert recipe.container == container
    assert len(recipe.resolve(facts())) == len(facts().tensors)


def test_unknown_recipes_and_wrong_containers():
    with pytest.raises(FewbitsError, match="unknown recipe 'Q9_X'"):
        get("Q9_X")
    with pytest.raises(FewbitsError, match="nf4 does not go to gguf"):
        get("nf4", "gguf")
    assert get("F16", "gguf").file_type == 1 and get("F16").file_type is None


def test_one_codec_for_all_linear_layers():
    chosen = get("nf4").resolve(facts())
    quantized = [c for c in chosen if c.solver]
    assert len(quantized) == 7 * 16 and {c.codec.name for c in quantized} == {codecs.get("nf4").name}
    assert all(c.codec == F16 for c in chosen if not c.solver)
    assert all(c.solver is None and c.codec == BF16 for c in get("bf16").resolve(facts()))


def test_a_pure_ggml_type_covers_embedding_and_head():
    got = types("Q4_K", facts())
    assert got["token_embd.weight"] == got["output.weight"] == got["blk.0.attn_v.weight"] == "Q4_K"


def test_quantized_sources_give_floats_where_a_tensor_stays():
    source = facts().tensors[0]
    assert source.role == "token_embd"
    entries = {f.name: Entry(f.name, f.shape, codecs.get("Q8_0"), lambda: None) for f in facts().tensors}
    again = ModelFacts.of(Checkpoint(None, "gguf", LLAMA | {"dtype": "bfloat16"}, entries))
    assert get("nf4").resolve(again)[0].codec == BF16


def test_solvers():
    chosen = {c.name: c.solver for c in get("Q8_0").resolve(facts(), solver="gptq")}
    assert chosen["model.layers.0.mlp.up_proj.weight"] == "gptq"
    assert chosen["model.embed_tokens.weight"] == "search"  # nothing is multiplied with it
    assert chosen["model.norm.weight"] is None


# architectures outside the table --------------------------------------------------------------------------------------
def test_linear_layers_of_other_architectures_come_from_transformers():
    chosen = {c.name: c for c in get("int8").resolve(ModelFacts.from_config(BERT))}
    quantized = {n for n, c in chosen.items() if c.solver}
    assert "encoder.layer.0.attention.self.query.weight" in quantized and "pooler.dense.weight" in quantized
    assert len(quantized) == 7
    assert not chosen["embeddings.word_embeddings.weight"].solver


def test_transposed_layers():
    chosen = {c.name: c for c in get("nf4").resolve(ModelFacts.from_config(GPT1))}
    fused = chosen["transformer.h.0.attn.c_attn.weight"]
    assert fused.transposed and fused.shape == (96, 32) and fused.solver
    assert chosen["transformer.tokens_embed.weight"].solver is None


def test_names_without_the_prefix_of_the_base_model():
    named = {"h.0.attn.c_attn.weight": (32, 96), "tokens_embed.weight": (50, 32)}
    entries = {n: Entry(n, s, F32, lambda: None) for n, s in named.items()}
    chosen = get("nf4").resolve(ModelFacts.of(Checkpoint("gpt1", "transformers", GPT1, entries)))
    assert [bool(c.solver) for c in chosen] == [True, False]


def test_names_with_a_prefix_that_the_model_lacks():
    named = {"bert.encoder.layer.0.attention.self.query.weight": (32, 32), "bert.unrelated.weight": (32, 32)}
    entries = {n: Entry(n, s, F32, lambda: None) for n, s in named.items()}
    chosen = get("nf4").resolve(ModelFacts.of(Checkpoint("bert", "transformers", BERT, entries)))
    assert [bool(c.solver) for c in chosen] == [True, False]
    assert chosen[1].note == "not a linear layer: F32"


def test_gguf_needs_the_table():
    with pytest.raises(FewbitsError, match="Q4_K_M goes to GGUF: BertModel: llama.cpp takes BERT with"):
        get("Q4_K_M").resolve(ModelFacts.from_config(BERT))


def test_unknown_architectures():
    with pytest.raises(FewbitsError, match="model_type 'nothing' is not known to transformers"):
        ModelFacts.from_config({"architectures": ["NothingModel"], "model_type": "nothing"})


# overrides ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", ["*.layers.3.mlp.up_proj.weight", "blk.3.ffn_up.weight", r"re:layers\.3\.mlp\.up",
                                     r"re:^blk\.3\.ffn_up"])
def test_overrides_by_either_name(pattern):
    got = types("Q4_K_M", facts(), overrides=[f"{pattern}=Q8_0"])
    plain = types("Q4_K_M", facts())
    assert {k for k in got if got[k] != plain[k]} == {"blk.3.ffn_up.weight"} and got["blk.3.ffn_up.weight"] == "Q8_0"


def test_the_last_override_wins_and_mappings_are_taken():
    got = types("Q8_0", facts(), overrides={"blk.*.ffn_up.weight": "Q4_0", "blk.0.*": "Q6_K"})
    assert got["blk.0.ffn_up.weight"] == "Q6_K" and got["blk.1.ffn_up.weight"] == "Q4_0"
    assert got["blk.0.attn_norm.weight"] == "F32"  # a glob passes over vectors


def test_overrides_to_floats_are_not_quantized():
    choice = next(c for c in get("Q4_K_M").resolve(facts(), ["output.weight=f16"]) if c.name == "lm_head.weight")
    assert choice.codec == F16 and choice.solver is None and "override" in choice.note


@pytest.mark.parametrize(("override", "message"), [
    ("blk.99.*=Q8_0", r"override blk.99.\*=Q8_0: matches no tensor"),
    ("*.norm.weight=Q8_0", "model.norm.weight .512. cannot take Q8_0: it is a vector"),
    ("nonsense", "not PATTERN=CODEC"), ("a=Q9", "unknown codec"), ("re:(=Q8_0", "not a regular expression"),
    ("*=IQ3_S", "IQ3_S is read and not written")])
def test_overrides_that_cannot_be(override, message):
    with pytest.raises(FewbitsError, match=message):
        get("Q4_K_M").resolve(facts(), [override])


def test_an_override_whose_codec_does_not_divide_is_refused():
    with pytest.raises(FewbitsError, match=r"model.layers.0.mlp.down_proj.weight \[64, 172\] cannot take Q8_0"):
        get("Q8_0").resolve(facts(hidden_size=64, intermediate_size=172), ["*.down_proj.weight=Q8_0"])


def test_shapes_from_the_configuration_are_those_of_the_files(shared):
    from fewbits import containers

    path = shared("models/stories260k")
    got = ModelFacts.from_config(json.loads((path / "config.json").read_text()))
    meant = ModelFacts.of(containers.open(path))
    assert {f.name: f.shape for f in got.tensors} == {f.name: f.shape for f in meant.tensors}
    assert [f.role for f in sorted(got.tensors, key=str)] == [f.role for f in sorted(meant.tensors, key=str)]
