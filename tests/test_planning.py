from __future__ import annotations

import json

import pytest

from fewbits import plan, quantize
from fewbits.errors import FewbitsError
from fewbits.inspection import size_on_disk
from fewbits.planning import kv_bytes, windows
from fewbits.recipe import PRESETS, ModelFacts

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
         "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 22, "vocab_size": 32000,
         "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "float16"}
GEMMA = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 640,
         "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
         "num_hidden_layers": 18, "vocab_size": 262144, "sliding_window": 512, "max_position_embeddings": 32768,
         "dtype": "bfloat16"}


@pytest.fixture
def config_only(tmp_path):
    def make(config: dict):
        path = tmp_path / "model"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        return path
    return make


def test_a_config_is_enough(config_only):
    got = plan(config_only(LLAMA), memory_bytes=6_000_000_000)
    assert got.parameters == 1_100_048_384  # TinyLlama's
    assert {r.recipe for r in got.rows} == set(PRESETS)
    assert not [r.reason for r in got.rows if r.reason]
    sizes = {r.recipe: r.file_bytes for r in got.rows}
    assert sizes["Q4_K_M"] == pytest.approx(668_788_096, rel=0.02)  # of the file that TinyLlama 1.1B is published as
    assert sizes["Q8_0"] == pytest.approx(1_170_781_568, rel=0.02)
    assert sizes["f16"] == pytest.approx(2_200_119_864, rel=0.02)
    assert got.kv_bytes == 22 * 2 * 4 * 64 * 2 * 4096
    assert json.loads(json.dumps(got.to_json()))["rows"][0]["recipe"] == got.rows[0].recipe


def test_what_to_take(config_only):
    path = config_only(LLAMA)
    assert plan(path, memory_bytes=10**11).take == "f16"
    tight = plan(path, memory_bytes=1_800_000_000)
    assert tight.take in {r.recipe for r in tight.rows if r.fits}
    assert tight.take == max((r for r in tight.rows if r.fits), key=lambda r: r.linear_bits).recipe
    assert "the next better" in tight.why
    assert all(r.total_bytes <= 1_800_000_000 for r in tight.rows if r.fits)
    assert all(r.total_bytes > 1_800_000_000 for r in tight.rows if not r.fits)
    none = plan(path, memory_bytes=10**8)
    assert none.take is None and "nothing fits into 100.0 MB" in none.why


def test_a_source_in_float32_may_become_float16(config_only):
    path = config_only(LLAMA | {"dtype": "float32"})
    assert plan(path, 10**11).take == "f32" and plan(path, 4 * 10**9).take == "f16"


def test_a_quantized_source_is_left_alone(tmp_path, shared):
    out = quantize(shared("models/stories260k"), tmp_path / "x.gguf", "Q4_0").path
    got = plan(out, 10**9)
    assert got.take is None and "quantized already" in got.why
    assert {r.recipe: r.file_bytes for r in got.rows}["Q4_0"] == pytest.approx(out.stat().st_size, rel=0.001)


def test_more_context_takes_more_memory(config_only):
    path = config_only(LLAMA)
    assert plan(path, 10**10, context=8192).kv_bytes == 2 * plan(path, 10**10).kv_bytes
    with pytest.raises(FewbitsError, match="context is 0"):
        plan(path, context=0)


def test_sliding_layers_hold_their_window():
    facts = ModelFacts.from_config(GEMMA)
    assert [w is None for w in windows(facts)] == [(i + 1) % 6 == 0 for i in range(18)]
    assert kv_bytes(facts, 4096) == 2 * 256 * 2 * (15 * 512 + 3 * 4096)
    assert kv_bytes(facts, 100) == 2 * 256 * 2 * 18 * 100
    mistral = LLAMA | {"model_type": "mistral", "sliding_window": 1024}
    assert windows(ModelFacts.from_config(mistral)) == [1024] * 22
    qwen = LLAMA | {"sliding_window": 1024, "use_sliding_window": False}
    assert windows(ModelFacts.from_config(qwen)) == [None] * 22


def test_other_architectures_and_their_reasons(config_only):
    path = config_only({"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 64,
                        "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 100})
    got = {r.recipe: r for r in plan(path, 10**9).rows}
    assert "WordPiece" in got["Q4_K_M"].reason and got["int8"].file_bytes > 0
    assert plan(path, 10**9).kv_bytes == 0  # an encoder keeps no cache


def test_fallbacks_are_counted(config_only):
    got = plan(config_only(GEMMA), 10**10, recipes=["Q6_K"]).rows[0]
    assert got.notes == ("Q6_K does not divide 640: Q8_0, +1.94 bits (91 tensors)",)


def test_a_file_as_it_is(shared):
    path = shared("models/stories260k")
    got = plan(path, 10**9, recipes=["f32"])
    assert got.rows[0].file_bytes == pytest.approx(size_on_disk(path), rel=0.001)
    assert got.take == "f32"
    with pytest.raises(FewbitsError, match="unknown recipe"):
        plan(path, recipes=["Q4_Z"])
