"""The native decoder against Transformers, and against itself: at once, token by token, in parts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import fewbits
from fewbits import _native, codecs, containers
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.runtime import decoder, engine, sequences
from fewbits.runtime.sequences import Decoder
from fewbits.solvers import solve
from tests.arch.models import MODELS as SMALL_MODELS
from tests.arch.models import ROPE, SMALL, VOCAB, directory, tiny

WINDOW = {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 1}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
ODD = {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 1, "intermediate_size": 77}
NARROW = {"intermediate_size": 76}  # Transformers wants multiples of 4 of experts
LAYERED = {"use_sliding_window": True, "sliding_window": 20}
NEOX = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
MODELS: dict[str, transformers.PreTrainedConfig] = {
    **{name: config for name, config in SMALL_MODELS.items() if not name.startswith("gpt_oss")},
    "llama": transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    "llama-odd": transformers.LlamaConfig(**(SMALL | ODD), head_dim=10, tie_word_embeddings=True,
                                          rope_parameters=LINEAR),
    "llama-relu": transformers.LlamaConfig(**SMALL, hidden_act="relu"),
    "mistral-window": transformers.MistralConfig(**SMALL, sliding_window=24),
    "qwen2-window": transformers.Qwen2Config(**SMALL, **WINDOW, rope_parameters=YARN),
    "qwen3-bias": transformers.Qwen3Config(**SMALL, head_dim=32, attention_bias=True),
    "gemma2-odd": transformers.Gemma2Config(**(SMALL | ODD), head_dim=10, sliding_window=7, query_pre_attn_scalar=5,
                                            attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3-odd": transformers.Gemma3TextConfig(
        **(SMALL | ODD | {"num_hidden_layers": 3}), head_dim=10, sliding_window=7, attention_bias=True,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters={"full_attention": LINEAR, "sliding_attention": ROPE}),
    "phi3-window": transformers.Phi3Config(**SMALL, pad_token_id=0, sliding_window=24),
    "gpt2-unscaled": transformers.GPT2Config(vocab_size=VOCAB, n_embd=60, n_layer=3, n_head=6, n_positions=128,
                                             scale_attn_weights=False, activation_function="relu"),
    "gpt2-by-layer": transformers.GPT2Config(vocab_size=VOCAB, n_embd=60, n_layer=3, n_head=6, n_positions=128,
                                             scale_attn_by_inverse_layer_idx=True),
    "gpt_neox-tied": transformers.GPTNeoXConfig(**(NEOX | {"hidden_size": 60, "num_attention_heads": 6}),
                                                tie_word_embeddings=True, attention_bias=False),
    "olmo2-odd": transformers.Olmo2Config(**(SMALL | ODD), attention_bias=True, tie_word_embeddings=True),
    "mixtral-window": transformers.MixtralConfig(**(SMALL | ODD | NARROW), num_local_experts=5, num_experts_per_tok=3,
                                                 sliding_window=24, head_dim=10),
    "qwen3_moe-odd": transformers.Qwen3MoeConfig(**(SMALL | ODD), **LAYERED, head_dim=10, moe_intermediate_size=36,
                                                 num_experts=8, num_experts_per_tok=3, norm_topk_prob=False),
}
TOKENS = torch.randint(VOCAB, (100,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory(tiny(MODELS["llama-odd"]), tmp_path_factory.mktemp("llama") / "m")


def compiled(path: Path) -> Decoder:
    return decoder.compile(containers.open(path))


def nmse(got: np.ndarray | torch.Tensor, want: np.ndarray | torch.Tensor) -> float:
    got, want = torch.as_tensor(got), torch.as_tensor(want)
    return float((got.double() - want.double()).square().sum() / want.double().square().sum())


def reference(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([TOKENS])).logits[0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = tiny(MODELS[name])
    made = compiled(directory(model, tmp_path / "m"))
    logits = made.logits(TOKENS)
    assert nmse(logits, reference(model)) <= 1e-6
    assert nmse(made.logits(TOKENS, last_only=True), logits[-1:]) <= 1e-10
    single = made.sequence(len(TOKENS))
    one_by_one = np.concatenate([single.append([token]) for token in TOKENS])
    assert nmse(one_by_one, logits) <= 1e-10
    parts = made.sequence(len(TOKENS))
    assert nmse(np.concatenate([parts.append(TOKENS[:37], False), parts.append(TOKENS[37:], False)]), logits) <= 1e-10
    assert len(parts) == len(TOKENS)


def test_longer_than_the_original_context(tmp_path: Path) -> None:
    """Keys of a sequence that grows beyond it, or is cut below it, are turned again."""
    model = tiny(MODELS["phi3-longrope"])
    made = compiled(directory(model, tmp_path / "m"))
    tokens = (TOKENS * 2)[:160]  # of 128
    with torch.inference_mode():
        want = {n: model(input_ids=torch.tensor([tokens[:n]])).logits[0] for n in (128, 129, 160)}
    assert nmse(want[128][:100], want[160][:100]) > 5e-5  # measured: 1e-4
    assert nmse(made.logits(tokens), want[160]) <= 1e-6
    sequence = made.sequence(200)
    assert nmse(sequence.append(tokens[:128], last_only=False), want[128]) <= 1e-6
    assert nmse(sequence.append(tokens[128:129]), want[129][-1:]) <= 1e-6
    assert nmse(sequence.append(tokens[129:], last_only=False), want[160][129:]) <= 1e-6
    sequence.truncate(100)
    assert nmse(sequence.append(tokens[100:128], last_only=False), want[128][100:]) <= 1e-6
    assert (len(sequence), sequence.tokens) == (128, tokens[:128])
    copied = sequence.copy()
    assert nmse(copied.append(tokens[128:], last_only=False), want[160][128:]) <= 1e-6
    short = made.sequence(200)
    long = made.sequence(200)
    long.append(tokens[:100])
    both = made.step([(short, tokens[:128], 128), (long, tokens[100:], 60)])
    assert nmse(both[0], want[128]) <= 1e-6 and nmse(both[1], want[160][100:]) <= 1e-6


def test_an_interrupt_where_keys_are_turned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled(directory(tiny(MODELS["phi3-longrope"]), tmp_path / "m"))
    sequence = made.sequence(200)
    sequence.append(TOKENS)

    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sequences, "threads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sequence.append(TOKENS[:50])
    monkeypatch.undo()
    assert (len(sequence), sequence.tokens) == (100, TOKENS)
    want = made.logits(TOKENS + TOKENS[:10], last_only=True)
    assert nmse(sequence.append(TOKENS[:10]), want) <= 1e-10


def test_every_set_of_instructions(path: Path, instructions: str) -> None:
    logits = compiled(path).logits(TOKENS)
    assert nmse(logits, reference(fewbits.load(path))) <= 1e-6


def test_threads_change_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled(path)
    logits = made.logits(TOKENS)
    monkeypatch.setattr(sequences, "threads", lambda: 3)
    assert np.array_equal(made.logits(TOKENS), logits)


HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("codec", HALVES)
def test_floats_are_multiplied_as_they_are_stored(codec: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QTensor, "dequantize", _only_vectors(QTensor.dequantize))
    checkpoint = containers.open(path)
    for name, entry in checkpoint.entries.items():
        if len(entry.shape) == 2:
            data = {"data": entry.load().planes["data"].to(HALVES[codec])}
            q = QTensor(codecs.get(codec), entry.shape, data)
            checkpoint.entries[name] = entry.as_(codec=q.codec, load=lambda q=q: q)
    logits = decoder.compile(checkpoint).logits(TOKENS)
    monkeypatch.undo()
    assert nmse(logits, reference(fewbits.load(checkpoint))) <= 1e-6


def _only_vectors(dequantize: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def checked(q: QTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        assert len(q.shape) == 1, "matrices are not decoded"
        return dequantize(q, dtype)

    return checked


BIG = {"vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
       "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048}


@pytest.mark.parametrize("codec", ["Q8_0", "Q4_K", "int8"])
def test_few_bits(codec: str, tmp_path: Path) -> None:
    """The same weights in `load`: both round activations; of `int8` the decoder rounds what that takes, too."""
    checkpoint = containers.open(directory(tiny(transformers.LlamaConfig(**BIG)), tmp_path / "m"))
    for name, entry in checkpoint.entries.items():
        if len(entry.shape) == 2:
            q = solve(entry.load().dequantize(), codecs.get(codec))
            checkpoint.entries[name] = entry.as_(codec=q.codec, load=lambda q=q: q)
    made = decoder.compile(checkpoint)
    logits = made.logits(TOKENS)
    assert nmse(logits, reference(fewbits.load(checkpoint))) <= 1e-3  # measured: 3e-4
    if codec == "int8":
        assert nmse(logits, reference(fewbits.load(checkpoint, kernel="decoded"))) <= 1e-6
    sequence = made.sequence(len(TOKENS))
    assert nmse(np.concatenate([sequence.append([token]) for token in TOKENS]), logits) <= 1e-3


@pytest.mark.parametrize(("name", "codec"), [
    *((name, "Q8_0") for name in ("gemma2", "phi3", "gpt2", "gpt_neox", "olmo2", "mixtral", "qwen3_moe")),
    *((name, codec) for name in ("phi3", "gpt_neox") for codec in ("Q4_0", "int4-g32", "nf4", "nf4-dq", "int8"))])
def test_few_bits_of_families(name: str, codec: str, tmp_path: Path) -> None:
    """What is fused or stacked is taken apart as it is packed; `decode` multiplies with the same weights."""
    path = directory(tiny(MODELS[name]), tmp_path / "m")
    checkpoint = containers.open(path)
    for key, entry in checkpoint.entries.items():
        if len(entry.shape) == 2 and entry.shape[1] % 32 == 0 and "gate.weight" not in key:
            q = solve(entry.load().dequantize(), codecs.get(codec))
            checkpoint.entries[key] = entry.as_(codec=q.codec, load=lambda q=q: q)
    made = decoder.compile(checkpoint)
    want = reference(fewbits.load(checkpoint, kernel="decode"))
    assert nmse(made.logits(TOKENS), want) <= 5e-4
    sequence = made.sequence(len(TOKENS))
    assert nmse(np.concatenate([sequence.append([token]) for token in TOKENS]), want) <= 5e-4


@pytest.mark.parametrize("name", [n for n in SMALL_MODELS if not n.startswith("gpt_oss")])
def test_gguf(name: str, tmp_path: Path) -> None:
    path = directory(tiny(MODELS[name]), tmp_path / "m")
    file = fewbits.convert(path, tmp_path / "x.gguf").path
    assert nmse(compiled(file).logits(TOKENS), reference(fewbits.load(file))) <= 1e-6


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    files = [str(fewbits.convert(directory(tiny(MODELS[name]), tmp_path / name), tmp_path / f"{name}.gguf").path)
             for name in ("llama", "gemma3", "phi3-longrope", "gpt2", "gpt_neox", "qwen3_moe")]
    code = """if True:
        import sys
        from fewbits import containers
        from fewbits.runtime import decoder
        for file in sys.argv[1:]:
            decoder.compile(containers.open(file)).logits([1, 2, 3])
        sys.exit(", ".join({"torch", "transformers"} & set(sys.modules)) or None)
    """
    ran = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
         "patch_size": 14}
TEXTS = {"gemma3": (transformers.Gemma3Config, transformers.Gemma3ForConditionalGeneration,
                    {**MODELS["gemma3"].to_dict(), "vocab_size": VOCAB}),
         "llava": (transformers.LlavaConfig, transformers.LlavaForConditionalGeneration, MODELS["llama"].to_dict())}


@pytest.mark.parametrize("name", TEXTS)
def test_models_with_a_tower(name: str, tmp_path: Path) -> None:
    config, kind, text = TEXTS[name]
    torch.manual_seed(0)
    made = config(text_config=text, vision_config={"model_type": "siglip_vision_model", **TOWER},
                  mm_tokens_per_image=4, image_token_index=VOCAB - 1, tie_word_embeddings=name == "gemma3")
    model = kind(made).eval()
    tokens = [t % (VOCAB - 2) for t in TOKENS]
    with torch.inference_mode():
        want = model(input_ids=torch.tensor([tokens])).logits[0]
    assert nmse(compiled(directory(model, tmp_path / "m")).logits(tokens), want) <= 1e-6


def test_orders_of_columns(path: Path) -> None:
    checkpoint = containers.open(path)
    for name, entry in checkpoint.entries.items():
        if "_proj.weight" in name:
            q, order = entry.load(), torch.randperm(entry.shape[1])
            stored = solve(q.dequantize()[:, order], codecs.get("int4-g32"))
            q = replace(stored, order=order)
            checkpoint.entries[name] = entry.as_(codec=q.codec, load=lambda q=q: q)
    logits = decoder.compile(checkpoint).logits(TOKENS)
    assert nmse(logits, reference(fewbits.load(checkpoint))) <= 1e-3  # measured: 2e-5
    assert nmse(logits, reference(fewbits.load(checkpoint, kernel="decode"))) <= 2e-3  # measured: 5e-4


def test_long_prompts_and_prefixes(tmp_path: Path) -> None:
    model = tiny(transformers.LlamaConfig(**(BIG | {"hidden_size": 64, "intermediate_size": 64})))
    made = compiled(directory(model, tmp_path / "m"))
    tokens = (TOKENS * 12)[:1100]  # more than two calls' worth
    with torch.inference_mode():
        want = model(input_ids=torch.tensor([tokens])).logits[0]
    assert nmse(made.logits(tokens), want) <= 1e-6
    sequence = made.sequence(1200)
    assert nmse(sequence.append(tokens), want[-1:]) <= 1e-6
    sequence.truncate(700)
    assert nmse(sequence.append(tokens[700:]), want[-1:]) <= 1e-6
    other = made.sequence(1100)  # beside it
    assert nmse(other.append(tokens[:600]), want[599:600]) <= 1e-6
    assert len(sequence) == 1100


def test_sequences_in_threads_of_their_own(path: Path) -> None:
    made = compiled(path)
    prompts = [TOKENS[i:i + 40] for i in range(0, 60, 10)]
    want = [made.logits(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for got, right in zip(pool.map(made.logits, prompts * 4), want * 4, strict=True):
            assert np.array_equal(got, right)


@pytest.mark.parametrize(("recipe", "limit"), [(None, 1e-6), ("Q8_0", 1e-4), ("Q4_0", 1e-4)])
def test_stories(recipe: str | None, limit: float, shared: Callable[[str], Path], tmp_path: Path) -> None:
    path = shared("models/stories260k")
    if recipe is not None:
        path = fewbits.quantize(path, tmp_path / "x.gguf", recipe).path
    tokens = [t % 512 for t in TOKENS]
    with torch.inference_mode():
        want = fewbits.load(path)(input_ids=torch.tensor([tokens])).logits[0]
    error = nmse(compiled(path).logits(tokens), want)
    assert error <= limit  # measured: 3e-5 with rounded activations


def test_errors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled(path)
    sequence = made.sequence(8)
    sequence.append([1, 2, 3])
    for tokens, match in (([], "no tokens to append"), ([1] * 6, "prompt of 6 tokens after 3, context 8"),
                          ([1, 320], "token 320 is not in the vocabulary of 320"), ([-1], "token -1 is not")):
        with pytest.raises(FewbitsError, match=match):
            sequence.append(tokens)
    with pytest.raises(FewbitsError, match="a sequence of 3 tokens cannot be cut to 4"):
        sequence.truncate(4)
    assert len(sequence) == 3
    with pytest.raises(FewbitsError, match="room for 257 tokens, the model's context is 1 to 256"):
        made.sequence(257)
    with pytest.raises(FewbitsError, match="room for 300 tokens"):
        made.logits([1] * 300)
    monkeypatch.setattr(engine, "available_bytes", lambda: 1000)
    with pytest.raises(FewbitsError, match="the cache of 256 tokens takes 0.00 GiB, 0.00 GiB are free"):
        made.sequence()


def test_what_cannot_be_compiled(path: Path) -> None:
    def refused(match: str, **changes: object) -> FewbitsError:
        checkpoint = containers.open(path)
        checkpoint.config.update(changes)
        with pytest.raises(FewbitsError, match=match) as error:
            decoder.compile(checkpoint)
        return error.value

    error = refused("no native decoder for model type 'opt'", model_type="opt")
    assert error.hint is not None and error.hint.startswith("there are llama, mistral, qwen2, ")
    refused("no native decoder for hidden_act 'tanh'", hidden_act="tanh")
    refused("no native decoder for rope type 'spiral'",
            rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})
    refused("rope type 'linear' needs 'factor'", rope_parameters={"rope_type": "linear", "rope_theta": 1e4})
    refused(r"mlp.*_proj.weight is \[.*\], the configuration wants \[", intermediate_size=100)
    refused(r"k_proj.weight is \[10, 60\], the configuration wants \[40, 60\]", num_key_value_heads=4)
    refused("no native decoder for LlamaForSequenceClassification", architectures=["LlamaForSequenceClassification"])
    refused("model.layers.2.*is missing", num_hidden_layers=3)
    refused("the configuration has num_hidden_layers = 0", num_hidden_layers=0)
    refused("the configuration has hidden_size = '60'", hidden_size="60")
    refused("1000000000 layers, with 20 tensors in the file", num_hidden_layers=10**9)


def test_families_refuse(tmp_path: Path) -> None:
    for name, match, changes in (
            ("gpt2", "add_cross_attention", {"add_cross_attention": True}),
            ("gemma3", "use_bidirectional_attention", {"use_bidirectional_attention": True}),
            ("gemma3", r"layer_types .* for 7 layers", {"layer_types": ["full_attention"] * 6}),
            ("qwen3_moe", "some layers without experts", {"mlp_only_layers": [1]}),
            ("mixtral", "a token goes to 1 or more of the experts", {"num_experts_per_tok": 5})):
        if not (tmp_path / name).exists():
            directory(tiny(MODELS[name]), tmp_path / name)
        checkpoint = containers.open(tmp_path / name)
        checkpoint.config.update(changes)
        with pytest.raises(FewbitsError, match=match):
            decoder.compile(checkpoint)


JUNK: tuple[Any, ...] = (None, -1, 0, 0.5, 1 << 40, 1e30, float("nan"), "x", True, [], ["x"], {}, {"x": 1})


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3-longrope", "gpt2", "gpt_neox", "qwen3_moe"])
def test_configurations_of_junk(name: str, tmp_path: Path) -> None:
    """A model, or an error of ours in one line."""
    path = directory(tiny(MODELS[name]), tmp_path / "m")
    checkpoint = containers.open(path)
    config = dict(checkpoint.config)
    for key in config:
        for junk in JUNK:
            checkpoint.config = config | {key: junk}
            try:
                decoder.compile(checkpoint).logits([1, 2, 3])
            except FewbitsError as error:
                assert len(str(error).splitlines()) == 1, (key, junk)
    for key, value in (config.get("rope_parameters") or {}).items():
        for junk in JUNK:
            inside = {key: {**value, "rope_theta": junk}} if isinstance(value, dict) else {key: junk}
            checkpoint.config = config | {"rope_parameters": config["rope_parameters"] | inside}
            with suppress(FewbitsError):
                decoder.compile(checkpoint).logits([1, 2, 3])


def test_native_checks() -> None:
    def plan(**changes: int) -> _native.Plan:
        sizes = dict(layers=1, heads=2, kv_heads=1, head=8) | changes
        return _native.Plan(widths=[16, 16, 8, 8], scale=1.0, **sizes)

    for changes, match in ((dict(kv_heads=0), "multiple"), (dict(head=257), "1 to 256 wide"), 
                           (dict(layers=-1), "number of layers")):
        with pytest.raises(ValueError, match=match):
            plan(**changes)
    table = _native.Floats(torch.zeros(5, 16).view(torch.uint8), "f32", 5, 16)
    head = _native.Floats(torch.zeros(7, 16).view(torch.uint8), "f32", 7, 16)
    p = plan()
    with pytest.raises(ValueError, match="the table's columns: 16, not 8"):
        p.embed(table, 2)
    with pytest.raises(ValueError, match="no buffer 4"):
        p.embed(table, 4)
    with pytest.raises(ValueError, match="a weight is a Weight or Floats"):
        p.embed("table", 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the norm's width"):
        p.norm(0, 0, torch.ones(5), 1e-6)
    with pytest.raises(ValueError, match="the norm's bias"):
        p.norm(0, 0, torch.ones(16), 1e-6, bias=torch.ones(16))
    with pytest.raises(ValueError, match="no activation is called tanh"):
        p.gate("tanh", 0, 1, 0)
    with pytest.raises(ValueError, match="no result yet"):
        p.cap(_native.RESULT, 5.0)
    with pytest.raises(ValueError, match="no buffer 9"):
        p.scale(9, 5.0)
    with pytest.raises(ValueError, match="three weights for every expert"):
        p.experts(0, head, [head], [head], [head], [0, 1, 1], 1, 1, True, "silu")
    with pytest.raises(ValueError, match="room for rows of experts: 16, not 32"):
        p.experts(0, head, [head], [head], [head], [0, 1, 1], 1, 2, True, "silu")
    with pytest.raises(ValueError, match="an expert's rows: 7, not 8"):
        p.experts(0, head, [head] * 7, [head] * 7, [head] * 7, [0, 2, 2], 1, 1, True, "silu")
    with pytest.raises(ValueError, match="as many stretched frequencies"):
        p.rotation([1.0] * 2, 1.0, [1.0])
    with pytest.raises(ValueError, match="cannot overwrite its input"):
        p.multiply(0, [head], [None], [0])
    with pytest.raises(ValueError, match="the bias's shape: 6, not 7"):
        p.multiply(0, [head], [torch.ones(6)], [_native.RESULT])
    with pytest.raises(ValueError, match="the keys' width: 16, not 8"):
        p.attend(0, 1, 2, 1, 0, 0, 0.0)
    with pytest.raises(ValueError, match="the layer or the window"):
        p.attend(0, 2, 3, 1, 1, 0, 0.0)
    with pytest.raises(ValueError, match="rotated columns of a head"):
        p.rotation([1.0] * 5, 1.0)
    with pytest.raises(ValueError, match="no rotation 0"):
        p.rotate(0, 0)
    cache, ids = _native.Cache(p, 4, "f16"), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="a plan embeds tokens, narrows and has a result"):
        p.step([cache], [2], [1], ids, torch.zeros(1, 7), False, 1)
    with pytest.raises(ValueError, match="the cap of scores"):
        p.attend(0, 2, 3, 1, 0, 0, -1.0)
    other = cache
    p = plan()
    p.embed(table, 0)
    p.positions(_native.Floats(torch.zeros(3, 16).view(torch.uint8), "f32", 3, 16), 1)
    with pytest.raises(ValueError, match="a plan narrows, has one head, and then a result"):
        p.head(0)
    p.narrow()
    p.head(0)
    p.multiply(0, [head], [None], [_native.RESULT])
    with pytest.raises(ValueError, match="a plan narrows, has one head, and then a result"):
        p.head(0)
    for states, out, match in ((torch.zeros(2, 15), torch.zeros(2, 7), "the states' width"),
                               (torch.zeros(2, 16), torch.zeros(2, 8), "the result's width"),
                               (torch.zeros(2, 16), torch.zeros(1, 7), "a result for each"),
                               (torch.zeros(0, 16), torch.zeros(0, 7), "1 to 512 states a call")):
        with pytest.raises(ValueError, match=match):
            p.finish(states, out, 1)
    cache = _native.Cache(p, 4, "f16")
    with pytest.raises(ValueError, match="the result's width"):
        p.step([cache], [2], [1], ids, torch.zeros(1, 7), True, 1)
    for tokens, out, match in ((ids, torch.zeros(1, 8), "the result's width"), (ids, torch.zeros(3, 7), "tokens"),
                               (torch.zeros(5, dtype=torch.int64), torch.zeros(1, 7), "more tokens than the cache"),
                               (torch.zeros(4, dtype=torch.int64), torch.zeros(1, 7), "than the table has positions"),
                               (ids[:0], torch.zeros(0, 7), "1 to 512 tokens a call"),
                               (ids + 5, torch.zeros(1, 7), "token 5 is not in 0 … 4")):
        with pytest.raises(ValueError, match=match):
            p.step([cache], [len(tokens)], [len(out)], tokens, out, False, 1)
    for caches, counts, wanted, match in (([cache], [1], [1], "as many results as are wanted"),
                                          ([cache, cache], [1, 1], [1, 0], "a cache is there twice"),
                                          ([other], [2], [1], "a cache belongs to its plan"),
                                          ([7], [2], [1], "a cache is a Cache"),
                                          ([cache], [2], [-1], "a sequence's tokens"),
                                          ([cache], [2], [], "tokens and results of every cache")):
        with pytest.raises(ValueError, match=match):
            p.step(caches, counts, wanted, ids, torch.zeros(1, 7), False, 1)
    assert cache.length == 0
    p.step([cache], [2], [0], ids, torch.zeros(0, 7), False, 1)
    assert (cache.length, cache.capacity) == (2, 4)
    with pytest.raises(ValueError, match="keys that were turned stay as they are"):
        cache.stretched = True
    with pytest.raises(ValueError, match="no more tokens than it has"):
        cache.truncate(3)
    with pytest.raises(ValueError, match="as many tokens are copied as there are"):
        _native.Cache(p, 4, "f16").copy(cache, 3)
    with pytest.raises(ValueError, match="as many tokens are copied as there are"):
        _native.Cache(p, 4, "q8_0").copy(cache, 1)
    with pytest.raises(ValueError, match="to another one of its plan"):
        cache.copy(cache, 1)
    with pytest.raises(ValueError, match="1 to 2.30 positions"):
        _native.Cache(p, 0, "f16")
    with pytest.raises(ValueError, match="a cache is f16, q8_0 or q4_0, not f8"):
        _native.Cache(p, 1, "f8")
