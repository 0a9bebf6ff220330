"""The native decoder against Transformers, and against itself: at once, token by token, in parts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import fewbits
from fewbits import _native, codecs, containers
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.runtime import decoder, sequences
from fewbits.runtime.sequences import Decoder
from fewbits.solvers import solve
from tests.arch.models import ROPE, SMALL, VOCAB, directory, tiny

WINDOW = {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 1}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
ODD = {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 1, "intermediate_size": 77}
MODELS: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    "llama-odd": transformers.LlamaConfig(**(SMALL | ODD), head_dim=10, tie_word_embeddings=True,
                                          rope_parameters=LINEAR),
    "mistral": transformers.MistralConfig(**SMALL, sliding_window=None, head_dim=32),
    "mistral-window": transformers.MistralConfig(**SMALL, sliding_window=24),
    "qwen2": transformers.Qwen2Config(**SMALL, rope_parameters=ROPE),
    "qwen2-window": transformers.Qwen2Config(**SMALL, **WINDOW, rope_parameters=YARN),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=32, rope_parameters=ROPE),
    "qwen3-tied": transformers.Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
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


def test_an_interrupt_leaves_the_sequence_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled(path)
    sequence = made.sequence(20)
    sequence.append(TOKENS[:3])
    monkeypatch.setattr(_native, "MOST_TOKENS", 4)
    calls = iter([1, 1])

    def interrupted() -> int:
        try:
            return next(calls)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(sequences, "threads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sequence.append(TOKENS[3:15])
    monkeypatch.undo()
    assert len(sequence) == 3
    assert np.array_equal(sequence.append(TOKENS[3:15]), made.logits(TOKENS[:15], last_only=True))


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
    monkeypatch.setattr(sequences, "available_bytes", lambda: 1000)
    with pytest.raises(FewbitsError, match="the cache of 256 tokens takes 0.00 GiB, 0.00 GiB are free"):
        made.sequence()


def test_what_cannot_be_compiled(path: Path) -> None:
    def refused(match: str, **changes: object) -> FewbitsError:
        checkpoint = containers.open(path)
        checkpoint.config.update(changes)
        with pytest.raises(FewbitsError, match=match) as error:
            decoder.compile(checkpoint)
        return error.value

    error = refused("no native decoder for model type 'gpt2'", model_type="gpt2")
    assert error.hint == "there are llama, mistral, qwen2, qwen3; fewbits.load() runs others"
    refused("no native decoder for hidden_act 'gelu'", hidden_act="gelu")
    refused("no native decoder for rope type 'dynamic'",
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    refused(r"mlp.*_proj.weight is \[.*\], the configuration wants \[", intermediate_size=100)
    refused("heads of queries are a multiple of those of keys", num_key_value_heads=4)
    refused("no native decoder for LlamaForSequenceClassification", architectures=["LlamaForSequenceClassification"])
    refused("model.layers.2.*is missing", num_hidden_layers=3)


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
        p.step([cache], [2], [1], ids, torch.zeros(1, 7), 1)
    with pytest.raises(ValueError, match="the cap of scores"):
        p.attend(0, 2, 3, 1, 0, 0, -1.0)
    other = cache
    p = plan()
    p.embed(table, 0)
    p.narrow()
    p.multiply(0, [head], [None], [_native.RESULT])
    cache = _native.Cache(p, 4, "f16")
    for tokens, out, match in ((ids, torch.zeros(1, 8), "the result's shape"), (ids, torch.zeros(3, 7), "tokens"),
                               (torch.zeros(5, dtype=torch.int64), torch.zeros(1, 7), "more tokens than the cache"),
                               (ids[:0], torch.zeros(0, 7), "1 to 512 tokens a call"),
                               (ids + 5, torch.zeros(1, 7), "token 5 is not in 0 … 4")):
        with pytest.raises(ValueError, match=match):
            p.step([cache], [len(tokens)], [len(out)], tokens, out, 1)
    for caches, counts, wanted, match in (([cache], [1], [1], "the result's shape"),
                                          ([cache, cache], [1, 1], [1, 0], "a cache is there twice"),
                                          ([other], [2], [1], "a cache belongs to its plan"),
                                          ([7], [2], [1], "a cache is a Cache"),
                                          ([cache], [2], [-1], "a sequence's tokens"),
                                          ([cache], [2], [], "tokens and results of every cache")):
        with pytest.raises(ValueError, match=match):
            p.step(caches, counts, wanted, ids, torch.zeros(1, 7), 1)
    assert cache.length == 0
    p.step([cache], [2], [0], ids, torch.zeros(0, 7), 1)
    assert (cache.length, cache.capacity) == (2, 4)
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
