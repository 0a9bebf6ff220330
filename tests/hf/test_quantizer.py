"""`from_pretrained(…, quantization_config=FewbitsConfig(…))` against files that `fewbits quantize` writes."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fewbits
from fewbits import FewbitsConfig
from fewbits.errors import FewbitsError
from fewbits.hf import disable, enable
from fewbits.notes import Differs
from fewbits.runtime.linear import QEmbedding, QLinear
from tests.hf.models import described, logits, packed, pretrained

pytestmark = pytest.mark.filterwarnings("ignore:.*does not divide:fewbits.notes.Differs")
LAYOUTS = {"nf4": "bitsandbytes", "fp4-dq": "bitsandbytes", "int8": "bitsandbytes", "int4-g32": "gptq",
           "int3-row-asym": "gptq", "fp8-e4m3": "compressed-tensors", "kmeans4": "fewbits", "Q8_0": "fewbits"}


def in_float16(tiny: Path, folder: Path, **changed: object) -> Path:
    """The tiny model with weights of 16 bits."""
    config = transformers.AutoConfig.from_pretrained(tiny, **changed)
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).half().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", LAYOUTS)
def test_equals_a_quantized_file_and_comes_back(recipe: str, tiny: Path, tmp_path: Path) -> None:
    gguf = recipe == "Q8_0"
    asked = {"overrides": {"*.down_proj.weight": "f32"}} if gguf else {}  # Q8_0 does not divide 172
    out = fewbits.quantize(tiny, tmp_path / ("a.gguf" if gguf else "a"), recipe, calibration="none", **asked).path
    net = pretrained(tiny, quantization_config=FewbitsConfig(recipe, **asked), device_map="auto")
    assert packed(net) == (13 if gguf else 14)
    assert isinstance(net.get_input_embeddings(), QEmbedding) == gguf
    assert torch.equal(logits(net), logits(fewbits.load(out)))
    net.save_pretrained(tmp_path / "b")
    assert described(tmp_path / "b")["quant_method"] == LAYOUTS[recipe]
    assert torch.equal(logits(fewbits.load(tmp_path / "b")), logits(net))
    enable(force=True)
    again = pretrained(tmp_path / "b")
    disable()
    assert packed(again) == packed(net) and torch.equal(logits(again), logits(net))
    again.save_pretrained(tmp_path / "c")
    assert described(tmp_path / "c") == described(tmp_path / "b")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "bc")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_our_own_layout_needs_nothing_turned_on(tiny: Path, tmp_path: Path) -> None:
    net = pretrained(tiny, quantization_config=FewbitsConfig("kmeans4"))
    net.save_pretrained(tmp_path / "a")
    ids = torch.tensor([[5, 6, 7]])
    again = pretrained(tmp_path / "a")
    assert torch.equal(again.generate(ids, max_new_tokens=5, do_sample=False),
                       net.generate(ids, max_new_tokens=5, do_sample=False))


def test_conv1d_and_a_model_without_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=70, n_positions=64, n_embd=64, n_layer=2, n_head=2,
                                     initializer_range=0.2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    net = pretrained(tmp_path / "gpt2", quantization_config=FewbitsConfig("nf4"))
    assert packed(net) == 8
    assert torch.equal(logits(net), logits(fewbits.load(tmp_path / "gpt2", recipe="nf4")))
    net.save_pretrained(tmp_path / "out")
    enable(force=True)
    body = transformers.AutoModel.from_pretrained(tmp_path / "out")
    disable()
    assert packed(body) == 8
    with torch.inference_mode():
        ids = torch.arange(3, 40)[None]
        assert torch.equal(body(input_ids=ids).last_hidden_state,
                           net(input_ids=ids, output_hidden_states=True).hidden_states[-1])


def test_experts_stay_in_floats_and_packed_ones_are_decoded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(vocab_size=70, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                                        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
                                        initializer_range=0.2)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "m")
    with pytest.warns(Differs, match="left as they are: Transformers has no packed layer"):
        fewbits.load(tmp_path / "m", recipe="nf4")
    for recipe in ("int4-g32", "nf4"):
        out = fewbits.quantize(tmp_path / "m", tmp_path / recipe, recipe, solver="search").path
        enable(force=True)
        net = pretrained(out)
        disable()
        assert packed(net) == 4
        assert torch.equal(logits(net), logits(fewbits.load(out)))


def test_embeddings_and_heads_stay_in_16_bits(tiny: Path, tmp_path: Path) -> None:
    for tied in (True, False):
        folder = in_float16(tiny, tmp_path / str(tied), tie_word_embeddings=tied)
        net = fewbits.load(folder, recipe="int8", kernel="decode")
        ends = net.get_input_embeddings(), net.get_output_embeddings()
        assert isinstance(ends[0], QEmbedding) and isinstance(ends[1], QLinear)
        assert (ends[0].prepared is ends[1].prepared) == tied and ends[0].q.codec.name == "F16"
        assert net.dtype == torch.float32
        want = pretrained(folder, quantization_config=FewbitsConfig("int8", kernel="decode"), dtype=torch.float32)
        assert packed(want) == packed(net) - 1
        torch.testing.assert_close(logits(net), logits(want), rtol=1e-5, atol=1e-5)
        net.save_pretrained(tmp_path / f"{tied}-saved")
        again = fewbits.load(tmp_path / f"{tied}-saved", kernel="decode")
        assert torch.equal(logits(again), logits(net))


def test_ggufs_load_save_and_take_another_recipe(tiny: Path, tmp_path: Path) -> None:
    out = fewbits.quantize(tiny, tmp_path / "a.gguf", "Q8_0").path
    net = fewbits.load(out)
    net.save_pretrained(tmp_path / "saved")
    assert described(tmp_path / "saved")["quant_method"] == "fewbits"
    assert torch.equal(logits(pretrained(tmp_path / "saved", dtype=torch.float32)), logits(net))
    with pytest.warns(Differs, match=r"quantized before \(Q8_0\): their error adds"):
        other = fewbits.load(out, recipe="int8")
    head = other.get_output_embeddings()
    assert {m.prepared.codec.name for m in other.modules() if isinstance(m, QLinear) and m is not head} == {"int8"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", Differs)
        warnings.filterwarnings("ignore", message=".*does not divide", category=Differs)
        same = fewbits.load(out, recipe="Q8_0")
    assert torch.equal(logits(same), logits(net))


def test_skip_and_overrides(tiny: Path) -> None:
    def codecs_of(net: torch.nn.Module) -> dict[str, str]:
        return {n: m.prepared.codec.name for n, m in net.named_modules() if isinstance(m, QLinear)}

    asked = {"skip": ["model.layers.0", "v_proj"], "overrides": {"*.down_proj.weight": "int8"}}
    found = codecs_of(fewbits.load(tiny, recipe="nf4", **asked))
    assert found == {f"model.layers.1.{n}": "nf4" for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")} | {
        "model.layers.1.mlp.down_proj": "int8"}
    assert codecs_of(pretrained(tiny, quantization_config=FewbitsConfig("nf4", **asked))) == found
    with pytest.warns(Differs, match="skip 'v_porj': matches no module of LlamaForCausalLM"):
        fewbits.load(tiny, recipe="nf4", skip=["v_porj"])


@pytest.mark.parametrize("recipe,options,message", [
    ("nf4", {"skip": ["model"]}, r"nf4 quantizes no layer of LlamaForCausalLM: skip=\['model'\] leaves none"),
    ("f16", {}, "f16 quantizes no layer of LlamaForCausalLM: it names a float type"),
    ("int4-g32", {"solver": "gptq"}, "solver gptq needs calibration text, which loading has none of"),
    ("nf5", {}, "unknown recipe 'nf5'")])
def test_what_cannot_be_is_refused(recipe: str, options: dict, message: str, tiny: Path) -> None:
    for load in (lambda: fewbits.load(tiny, recipe=recipe, **options),
                 lambda: pretrained(tiny, quantization_config=FewbitsConfig(recipe, **options))):
        with pytest.raises(FewbitsError, match=message):
            load()


def test_a_recipe_that_fits_no_layer_names_one(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=70, hidden_size=96, intermediate_size=160, num_hidden_layers=1,
                                     num_attention_heads=4)
    transformers.BertModel(config).save_pretrained(tmp_path)
    message = r"Q4_K quantizes no layer of BertModel: .*weight \[96, 96\]: 96 columns are not a multiple of 256"
    with pytest.raises(FewbitsError, match=message):
        fewbits.load(tmp_path, recipe="Q4_K")
    with pytest.raises(FewbitsError, match=message):
        transformers.AutoModel.from_pretrained(tmp_path, quantization_config=FewbitsConfig("Q4_K"))


def test_places_without_a_kernel_and_models_without_a_recipe(tiny: Path) -> None:
    with pytest.raises(FewbitsError, match="no GPU: torch .* sees no cuda device"):
        pretrained(tiny, quantization_config=FewbitsConfig("nf4"), device_map={"": "cuda:0"})
    with pytest.raises(FewbitsError, match="not quantized, and FewbitsConfig names no recipe"):
        pretrained(tiny, quantization_config=FewbitsConfig())


def test_nan_is_named(tiny: Path, tmp_path: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 4] = float("nan")
    shutil.copytree(tiny, tmp_path / "m")
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FewbitsError, match=f"{name} has 1 values that are NaN"):
        fewbits.load(tmp_path / "m", recipe="nf4")


def test_calibrated_while_loading(tiny: Path, tmp_path: Path, english: Path) -> None:
    lines = [line for line in english.read_text().splitlines() if len(line) > 60][:8]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    batches = [{"input_ids": tokenizer(line, return_tensors="pt")["input_ids"]} for line in lines]
    out = fewbits.quantize(tiny, tmp_path / "a", "int4-g32", calibration=batches).path
    with pytest.warns(Differs, match="calibrated on 8 batches"):
        net = pretrained(tiny, quantization_config=FewbitsConfig("int4-g32", calibration=lines))
    assert torch.equal(logits(net), logits(fewbits.load(out)))
    assert not torch.equal(logits(net), logits(fewbits.load(tiny, recipe="int4-g32")))
    left = FewbitsConfig("int4-g32", calibration=lines, skip=["model.layers.1"])
    with pytest.warns(Differs, match="calibrated on 8 batches"):
        assert packed(pretrained(tiny, quantization_config=left)) == 7


def test_dequantize(tiny: Path) -> None:
    net = pretrained(tiny, quantization_config=FewbitsConfig("Q8_0", kernel="decode"))
    before = logits(net)
    plain = net.dequantize()
    assert packed(plain) == 0 and not hasattr(plain, "hf_quantizer")
    torch.testing.assert_close(logits(plain), before, rtol=1e-5, atol=1e-5)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
