"""Recipes as TOML files."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewbits import plan, quantize
from fewbits.errors import FewbitsError
from fewbits.recipe import ModelFacts, get

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024,
         "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 4, "vocab_size": 1000,
         "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "float16"}


@pytest.fixture
def recipe(tmp_path):
    def make(text: str) -> str:
        path = tmp_path / "my.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)
    return make


def by_name(name: str, **options) -> dict:
    facts = ModelFacts.from_config(LLAMA)
    return {f.gguf: c for f, c in zip(facts.tensors, get(name).resolve(facts, **options), strict=True)}


def test_the_guide_shows_the_example():
    guide = (EXAMPLES.parents[1] / "docs" / "guides" / "recipes.md").read_text(encoding="utf-8")
    assert (EXAMPLES / "careful-q4.toml").read_text(encoding="utf-8") in guide


def test_the_example():
    got, plain = by_name(str(EXAMPLES / "careful-q4.toml"), solver="gptq"), by_name("Q4_K_M", solver="gptq")
    assert got["blk.2.attn_v.weight"].codec.name == got["blk.0.ffn_down.weight"].codec.name == "Q8_0"
    assert (got["blk.0.ffn_up.weight"].codec.name, got["blk.0.ffn_up.weight"].solver) == ("Q5_0", "nearest")
    assert got["blk.2.ffn_up.weight"] == plain["blk.2.ffn_up.weight"] and got["blk.2.ffn_up.weight"].solver == "gptq"
    changed = {k for k in got if got[k] != plain[k]}
    assert changed == {f"blk.{i}.attn_v.weight" for i in range(4)} | {
        f"blk.0.{part}.weight" for part in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    assert get(str(EXAMPLES / "careful-q4.toml")).file_type == get("Q4_K_M").file_type


def test_a_file_is_quantized_with(recipe, shared, tmp_path):
    name = recipe('base = "Q8_0"\nsolver = "nearest"\n[tensors]\n"*.v_proj.weight" = "Q4_0"\n'
                  '"*.o_proj.weight" = { codec = "Q5_1", solver = "search" }\n')
    result = quantize(shared("models/stories260k"), tmp_path / "out.gguf", name)
    got = {t["name"].split(".")[-2]: (t["codec"], t["solver"]) for t in result.tensors if "layers.0" in t["name"]}
    assert got["v_proj"] == ("Q4_0", "nearest") and got["o_proj"] == ("Q5_1", "search")
    assert got["q_proj"] == ("Q8_0", "nearest") and result.recipe == name
    again = quantize(shared("models/stories260k"), tmp_path / "again.gguf", name, solver="search",
                     overrides=["*.v_proj.weight=Q5_0"])
    got = {t["name"].split(".")[-2]: (t["codec"], t["solver"]) for t in again.tensors if "layers.0" in t["name"]}
    assert got["v_proj"] == ("Q5_0", "search") and got["q_proj"] == ("Q8_0", "search"), "the call goes before the file"


def test_plans_take_files(recipe, shared):
    name = recipe('base = "int4-g32"\n[tensors]\n"*.v_proj.weight" = "int8-g32"\n')
    got = plan(shared("models/stories260k"), 10**9, recipes=[name, "int4-g32"])
    small, large = got.rows
    assert (small.recipe, large.recipe) == ("int4-g32", name) and small.file_bytes < large.file_bytes
    assert got.take == name


def test_containers(recipe):
    assert get(recipe('base = "f16"')).container == "transformers"
    assert get(recipe('base = "f16"\ncontainer = "gguf"')).container == "gguf"
    assert get(recipe('base = "f16"\ncontainer = "gguf"'), "transformers").container == "transformers"
    with pytest.raises(FewbitsError, match="my.toml: nf4 does not go to gguf"):
        get(recipe('base = "nf4"\ncontainer = "gguf"'))


def test_a_solver_that_needs_text_is_refused_without(recipe, shared, tmp_path):
    name = recipe('base = "Q8_0"\n[tensors]\n"*.v_proj.weight" = { codec = "Q4_0", solver = "gptq" }\n')
    with pytest.raises(FewbitsError, match="solver gptq needs calibration text"):
        quantize(shared("models/stories260k"), tmp_path / "out.gguf", name)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("text", "message", "hint"), [
    ("base = ", "my.toml: not TOML: Invalid value", None),
    ('solver = "search"', "my.toml: no base", "Q4_K_M"),
    ("base = 4", "my.toml: base is 4; a text in quotes is expected", None),
    ('base = "Q9"', "my.toml: unknown recipe 'Q9'", "a mix of llama.cpp"),
    ('base = "other.toml"', "my.toml: base is the file 'other.toml'", "a preset or a codec"),
    ('base = "nf4"\nbits = 4', "my.toml: unknown key 'bits'", "base, container, solver, tensors"),
    ('base = "nf4"\nsolver = "magic"', "my.toml: unknown solver 'magic'", "nearest, search, gptq"),
    ('base = "nf4"\ntensors = "all"', "my.toml: tensors is no table", "[tensors]"),
    ('base = "nf4"\n[tensors]\n"a" = 3', "tensors.'a' is 3", "codec ="),
    ('base = "nf4"\n[tensors]\nblk.0.ffn = "Q8_0"', "tensors.'blk' is a table of tables", "needs quotes"),
    ('base = "nf4"\n[tensors]\n"a" = { solver = "search" }', "tensors.'a' names no codec", "codec ="),
    ('base = "nf4"\n[tensors]\n"a" = { codec = "nf4", bits = 3 }', "tensors.'a': unknown key 'bits'", "codec, solver"),
    ('base = "nf4"\n[tensors]\n"a" = { codec = "nf4", solver = "magic" }', "tensors.'a': unknown solver", "search"),
    ('base = "nf4"\n[tensors]\n"a" = "Q9"', "my.toml: tensors.'a': unknown codec 'Q9'", "int4-g128"),
    ('base = "nf4"\n[tensors]\n"re:(" = "nf4"', "my.toml: re:(=nf4: not a regular expression", None),
    ('base = "nf4"\n[tensors]\n"a" = "IQ3_S"', "my.toml: a=IQ3_S: IQ3_S is read and not written here", None),
])
def test_files_that_are_no_recipes(recipe, text, message, hint):
    with pytest.raises(FewbitsError) as error:
        get(recipe(text))
    assert message in str(error.value)
    assert hint is None and error.value.hint is None or hint in error.value.hint


def test_patterns_that_match_nothing_and_missing_files(recipe, tmp_path):
    with pytest.raises(FewbitsError, match=r"my.toml: blk.9.\*=nf4: matches no tensor"):
        by_name(recipe('base = "nf4"\n[tensors]\n"blk.9.*" = "nf4"'))
    with pytest.raises(FewbitsError, match=r"none.toml: No such file"):
        get(str(tmp_path / "none.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(FewbitsError, match=r"binary.toml: not TOML"):
        get(str(tmp_path / "binary.toml"))
