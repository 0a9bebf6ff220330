"""Error by layer against the definition."""

from __future__ import annotations

from pathlib import Path

import pytest

import fewbits
from fewbits import containers
from fewbits.errors import FewbitsError
from fewbits.measure.compare import layers
from tests.arch.models import directory
from tests.arch.models import tiny as tiny_model


def test_relative_squared_error(tiny: Path, tmp_path: Path) -> None:
    out = fewbits.quantize(tiny, tmp_path / "q", "nf4").path
    one, other = containers.open(tiny), containers.open(out)
    found = layers.errors(other, one)
    assert [(r["kind"], r["layer"]) for r in found] == [
        (kind, layer) for kind in ("q", "k", "v", "o", "gate", "up", "down") for layer in (0, 1)]
    name = "model.layers.1.mlp.down_proj.weight"
    w, q = (c.entries[name].load().dequantize().double() for c in (one, other))
    want = float(((w - q) ** 2).sum() / (w ** 2).sum())
    assert found[-1]["error"] == pytest.approx(want, rel=1e-5) and 0.002 < want < 0.03


def test_an_embedding_belongs_to_no_layer(tiny: Path, tmp_path: Path) -> None:
    out = fewbits.quantize(tiny, tmp_path / "q.gguf", "Q8_0").path
    first, *rest = layers.errors(containers.open(out), containers.open(tiny))
    assert (first["kind"], first["layer"]) == ("embedding", None) and 0 < first["error"] < 1e-3
    assert len(rest) == 14


def test_experts_count_together(tmp_path: Path, tiny: Path) -> None:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=64)
    source = directory(tiny_model(config), tmp_path / "moe", tokenizer=tiny)
    one = containers.open(source)
    found = {(r["kind"], r["layer"]): r["error"] for r in layers.errors(
        containers.open(fewbits.quantize(source, tmp_path / "q", "int8").path), one)}
    assert {"gate", "up", "down"} <= {kind for kind, _ in found} and all(0 < e < 1e-2 for e in found.values())


def test_another_model(tiny: Path, tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(vocab_size=262, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                      num_attention_heads=4)
    other = containers.open(directory(tiny_model(config), tmp_path / "other", tokenizer=tiny))
    with pytest.raises(FewbitsError, match="no tensor model.layers.1|is \\[.*the original's"):
        layers.errors(other, containers.open(tiny))
