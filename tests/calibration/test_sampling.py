"""Text that a model writes: against the same draws decided by forward passes over the whole text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from fewbits import containers, loading
from fewbits.calibration import sampling
from fewbits.calibration.sampling import sample
from fewbits.calibration.sources import calibration
from fewbits.errors import FewbitsError
from fewbits.runtime import build
from tests.arch.models import MODELS, directories

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "mixtral", "gpt_oss"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, tiny: Path):
    return directories(MODELS, tmp_path_factory, tiny)


def expected(path: Path, tokens: torch.Tensor, draws: torch.Tensor, ends: set[int]) -> torch.Tensor:
    """What each draw picks after the tokens before it, in float64, without a cache; -1 where a text begins."""
    net = loading.load(path)
    found = torch.full_like(tokens, -1)
    for r, row in enumerate(tokens.tolist()):
        logits = net(input_ids=tokens[r:r + 1], use_cache=False).logits[0].double()
        for at in range(1, len(row)):
            if row[at - 1] not in ends:
                p = logits[at - 1].softmax(-1)
                found[r, at] = int((p.cumsum(0) <= float(draws[r, at])).sum())
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_draw_is_decided_by_the_models_own_probabilities(name: str, family):
    path = family(name)
    tokens = sample(containers.open(path), 3, 40, seed=5)
    draws = torch.rand(3, 40, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        wanted = expected(path, tokens, draws, sampling_ends(path))
    asked = wanted >= 0
    assert asked.sum() > 60
    assert (tokens == wanted)[asked].float().mean() > 0.97  # a draw within rounding of the edge between two tokens


def sampling_ends(path: Path) -> set[int]:
    net = loading.load(path)
    return set(sampling._ends(net, loading.tokenizer(net)).tolist())


def test_a_text_that_ends_is_followed_by_another(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """With most tokens made ends, rows are full; after an end come BOS and a first token, not the model's choice."""
    many = torch.arange(3, 200)
    monkeypatch.setattr(sampling, "_ends", lambda net, words: many)
    monkeypatch.setattr(sampling, "_firsts", lambda words: torch.tensor([2]))
    source = containers.open(tiny)
    tokens = sample(source, 4, 32, seed=0)
    ended = torch.isin(tokens[:, :-1], many)
    assert ended.sum() > 10 and bool((tokens[:, 1:][ended] == 2).all()) and bool((tokens[:, 0] == 2).all())
    for bos, ends in ((1, many), (2, torch.tensor([2, *many]))):  # BOS and EOS may be one token
        monkeypatch.setattr(build, "bos_of", lambda words, bos=bos: bos)
        monkeypatch.setattr(sampling, "_ends", lambda net, words, ends=ends: ends)
        monkeypatch.setattr(sampling, "_firsts", lambda words: torch.tensor([250]))
        tokens = sample(source, 4, 32, seed=0)
        after = torch.isin(tokens[:, :-1], many)
        assert after.sum() > 10 and bool((tokens[:, 1:][after] == bos).all()) and bool((tokens[:, 0] == bos).all())
        assert bool((tokens[:, 1:][tokens[:, :-1] == bos] == 250).all())


def test_texts_begin_with_any_ordinary_token(tiny: Path):
    words = loading.tokenizer(loading.load(tiny))
    firsts = set(sampling._firsts(words).tolist())
    assert firsts == set(range(len(words))) - {0, 1, 2}  # all but <unk>, <s> and </s>


def test_the_same_seed_gives_the_same_text_however_many_rows_go_together(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    source = containers.open(tiny)
    steps: list[tuple[int, int]] = []
    one = calibration("self", source, samples=5, length=24, seed=3,
                      progress=lambda what, done, total: steps.append((done, total)))
    assert steps[0] == (5, 120) and steps[-1] == (120, 120) and len(steps) == 24
    assert one.digest() == calibration("self", source, samples=5, length=24, seed=3).digest()
    assert one.digest() != calibration("self", source, samples=5, length=24, seed=4).digest()
    monkeypatch.setattr(sampling, "ROOM", 1)
    assert one.digest() == calibration("self", source, samples=5, length=24, seed=3).digest()
    assert one.description == "self (text sampled from the model), 5 x 24 tokens, seed 3"


def test_models_that_write_nothing_are_refused(tmp_path: Path, tiny: Path):
    config = transformers.BertConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=64)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    with pytest.raises(FewbitsError, match="BertForMaskedLM writes no text"):
        calibration("self", containers.open(tmp_path), samples=1, length=8)


def test_logits_that_are_not_finite_stop_it(tiny: Path, tmp_path: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    with pytest.raises(FewbitsError, match="not finite at token 1"):
        calibration("self", containers.open(tmp_path), samples=1, length=8)
