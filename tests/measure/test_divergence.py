"""Divergence against its definition, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import fewbits
from fewbits.errors import FewbitsError
from fewbits.loading import tokenizer
from fewbits.measure.divergence import cut, read_text
from tests.arch.models import directory
from tests.arch.models import tiny as tiny_model


def test_figures_follow_their_definitions(tiny: Path, tmp_path: Path, english: Path) -> None:
    out = fewbits.quantize(tiny, tmp_path / "q", "int2-g32", calibration="none").path
    found = fewbits.evaluate(fewbits.load(out), fewbits.load(tiny), text=english, chunks=3, context=64)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    quantized = fewbits.load(out)
    windows = cut(read_text(english), tokenizer(quantized), 64, 3, "text", None)
    p_all, q_all, targets = [], [], []
    with torch.inference_mode():
        for w in windows:
            p_all.append(model(input_ids=w[None]).logits[0, :-1].double().softmax(-1))
            q_all.append(quantized(input_ids=w[None]).logits[0, :-1].double().softmax(-1))
            targets.append(w[1:])
    p, q, t = torch.cat(p_all), torch.cat(q_all), torch.cat(targets)
    kl = (p * (p / q).log()).sum(-1)
    assert found.tokens == len(t) == 3 * 63
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.kl_99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-3)
    assert found.perplexity == pytest.approx(float((-q.gather(1, t[:, None]).log()).mean().exp()), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(float((-p.gather(1, t[:, None]).log()).mean().exp()), rel=1e-5)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_the_native_decoder_computes_files(tiny: Path, tmp_path: Path, english: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    out = fewbits.quantize(tiny, tmp_path / "q", "int2-g32", calibration="none").path
    want = fewbits.evaluate(out, tiny, text=english, chunks=2, context=200, kernel="decoded")
    monkeypatch.setattr("fewbits.loading.load", None)
    found = fewbits.evaluate(out, tiny, text=english, chunks=2, context=200)
    assert found.tokens == want.tokens == 2 * 199
    assert found.reference_perplexity == pytest.approx(want.reference_perplexity, rel=1e-4)  # the cache's rounding
    assert found.perplexity == pytest.approx(want.perplexity, rel=1e-2)  # activations' rounding
    assert found.kl_mean == pytest.approx(want.kl_mean, rel=1e-2)


def test_families_without_a_native_decoder(tmp_path: Path, english: Path, tiny: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.OPTConfig(vocab_size=300, hidden_size=32, ffn_dim=32, num_hidden_layers=1,
                                    num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=32)
    model = directory(tiny_model(config), tmp_path / "opt", tokenizer=tiny)
    found = fewbits.evaluate(model, text=english, chunks=1, context=32)
    assert "no native decoder for model type 'opt'; Transformers computes" in capsys.readouterr().err
    assert found == replace(fewbits.evaluate(fewbits.load(model), text=english, chunks=1, context=32),
                            seconds=found.seconds)


def test_without_a_reference_only_perplexity(tiny: Path, english: Path) -> None:
    found = fewbits.evaluate(tiny, text=english, chunks=1, context=64)
    assert found.kl_mean is None and found.perplexity > 1 and found.tokens == 63


def test_text_shorter_than_a_chunk(tiny: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("abc")
    with pytest.raises(FewbitsError, match="3 tokens, one chunk needs 512"):
        fewbits.evaluate(tiny, text=short)


def test_text_that_is_missing_or_binary(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="nowhere.txt: No such file"):
        fewbits.evaluate(tiny, text=tmp_path / "nowhere.txt")
    (tmp_path / "binary").write_bytes(b"ab\xff\xfe")
    with pytest.raises(FewbitsError, match="not UTF-8 at byte 2"):
        fewbits.evaluate(tiny, text=tmp_path / "binary")


def test_windows_begin_with_the_models_first_token(tiny: Path, english: Path) -> None:
    words = tokenizer(fewbits.load(tiny))
    plain, marked = (cut(read_text(english), words, 32, 4, "text", bos) for bos in (None, 1))
    assert plain.shape == marked.shape == (4, 32)
    assert (marked[:, 0] == 1).all() and torch.equal(marked[0, 1:], plain[0, :31])
