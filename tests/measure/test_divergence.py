"""Divergence against its definition, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fewbits
from fewbits import devices
from fewbits.errors import FewbitsError
from fewbits.loading import tokenizer
from fewbits.measure.scoring import Decoded
from fewbits.measure.windows import cut, read_text
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
    second = torch.arange(len(t)) % 63 >= 32  # of each window, as llama.cpp counts
    assert found.compared == int(second.sum()) == 3 * 31
    assert found.kl_mean == pytest.approx(float(kl[second].mean()), rel=1e-4)
    assert found.kl_mean_error == pytest.approx(float(kl[second].std()) / 93 ** 0.5, rel=1e-4)
    for value, part in (found.kl_median, 0.5), (found.kl_99, 0.99), (found.kl_999, 0.999):
        assert value == pytest.approx(float(kl[second].quantile(part)), rel=1e-3)
    mine, known = (-x.gather(1, t[:, None])[:, 0].log() for x in (q, p))
    assert found.perplexity_error == pytest.approx(found.perplexity * float(mine.std()) / 189 ** 0.5, rel=1e-4)
    assert found.perplexity_llama == pytest.approx(float(mine[second].mean().exp()), rel=1e-5)
    assert found.reference_perplexity_llama == pytest.approx(float(known[second].mean().exp()), rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(found.perplexity / found.reference_perplexity)
    apart = found.perplexity_ratio * float((mine - known).std()) / 189 ** 0.5
    assert found.perplexity_ratio_error == pytest.approx(apart, rel=1e-4)
    assert found.perplexity == pytest.approx(float((-q.gather(1, t[:, None]).log()).mean().exp()), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(float((-p.gather(1, t[:, None]).log()).mean().exp()), rel=1e-5)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1))[second].double().mean()))


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


def test_a_reference_is_computed_once(tiny: Path, tmp_path: Path, english: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))
    out = fewbits.quantize(tiny, tmp_path / "q.gguf", "Q4_0", calibration="none").path
    first = fewbits.evaluate(out, tiny, text=english, chunks=2, context=64)
    files = sorted((tmp_path / "cache" / "references").glob("*/*.npz"))
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:100])  # as a full disk leaves it
    states = Decoded.states
    computed = []

    def counting(self: Decoded, window: torch.Tensor) -> Any:
        computed.append(Path(self.checkpoint.path).name)
        return states(self, window)

    monkeypatch.setattr(Decoded, "states", counting)
    again = fewbits.evaluate(out, tiny, text=english, chunks=3, context=64)
    assert sorted(computed) == ["q.gguf"] * 3 + ["tiny"] * 2  # one was broken, one is new
    same = fewbits.evaluate(out, tiny, text=english, chunks=2, context=64)
    assert replace(same, seconds=first.seconds) == first and again.kl_mean != first.kl_mean
    assert computed[5:] == ["q.gguf"] * 2


def test_on_a_gpu(tiny: Path, tmp_path: Path, english: Path, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of a reference that the CPU computed does not stand for the GPU's."""
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(devices, "free_bytes", lambda device: 1 << 40)
    want = fewbits.evaluate(tiny, tiny, text=english, chunks=1, context=16)
    found = fewbits.evaluate(tiny, tiny, text=english, chunks=1, context=16, device="cuda")
    assert found.perplexity == pytest.approx(want.perplexity, rel=1e-4) and found.kl_mean == pytest.approx(0, abs=1e-9)
    assert all(kernel.startswith("decoder on ") for kernel in found.circumstances["kernels"])
    assert len(list((tmp_path / "cache" / "references").iterdir())) == 2


def test_a_model_is_no_distance_from_itself(tiny: Path, english: Path) -> None:
    found = fewbits.evaluate(tiny, tiny, text=english, chunks=1, context=64)
    assert abs(found.kl_mean) < 1e-6 and found.top1 == 1 and found.perplexity_ratio == 1


def test_a_broken_model_is_called_that(tiny: Path, tmp_path: Path, english: Path) -> None:
    broken = shutil.copytree(tiny, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    for kernel in None, "decoded":
        with pytest.raises(FewbitsError, match="broken: logits are NaN or infinite"):
            fewbits.evaluate(broken, text=english, chunks=1, context=64, kernel=kernel)


def test_tokenizers_that_differ(tiny: Path, tmp_path: Path, english: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["merges"] = words["model"]["merges"][:1]
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(FewbitsError, match="tokenizers differ: token .* sample.txt is '(er|in)' to tiny, '.' to other"):
        fewbits.evaluate(tiny, other, text=english, chunks=1, context=64)


def test_what_is_needed_to_repeat_it(tiny: Path, english: Path) -> None:
    told = fewbits.evaluate(tiny, tiny, text=english, chunks=2, context=64).to_json()["circumstances"]
    assert told["text"] == english.name and told["chunks"] == 2 and told["context"] == 64
    assert told["kernels"] == ["native decoder"] * 2 and len(told["models"]) == 2 and told["tokens_sha256"]


def test_windows_that_are_too_short(tiny: Path, english: Path) -> None:
    with pytest.raises(FewbitsError, match="a context of 3 tokens"):
        fewbits.evaluate(tiny, text=english, context=3)


def test_windows_begin_with_the_models_first_token(tiny: Path, english: Path) -> None:
    words = tokenizer(fewbits.load(tiny))
    plain, marked = (cut(read_text(english), words, 32, 4, "text", bos) for bos in (None, 1))
    assert plain.shape == marked.shape == (4, 32)
    assert (marked[:, 0] == 1).all() and torch.equal(marked[:, 1:], plain[:, 1:])
