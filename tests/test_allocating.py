"""A target becomes a recipe: sizes, what shares a codec, what is refused, and that it serves better than one type."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import fewbits
from fewbits import allocating, containers
from fewbits.allocating import Room
from fewbits.calibration import sources
from fewbits.errors import FewbitsError
from fewbits.recipe import ModelFacts, get
from fewbits.recipe.allocation import Target

TIED = "model.embed_tokens.weight"
QUICK = {"samples": 2, "length": 64}


def share(source: Any, bits: float, english: Path, container: str = "gguf", **settings: Any) -> allocating.Allocation:
    text = sources.calibration(english, source, **QUICK)
    return allocating.share_out(source, Target(bits=bits), container, text, **settings)


def test_a_file_of_the_bits_asked_for_and_of_less_loss_than_one_type(tiny: Path, tmp_path: Path, english: Path) -> None:
    """Down projections, 172 wide, stay in float16: the target is of all weights."""
    pure = fewbits.quantize(tiny, tmp_path / "pure.gguf", "Q4_1", overrides=[f"{TIED}=Q4_1"])
    result = fewbits.quantize(tiny, tmp_path / "a.gguf", f"{pure.bits_per_weight:.3f}bpw", calibration=english,
                              solver="search", length=64)
    assert pure.bits_per_weight - 0.15 < result.bits_per_weight <= pure.bits_per_weight
    kl, uniform = (fewbits.evaluate(r.path, tiny, text=english, chunks=4, context=64).kl_mean for r in (result, pure))
    assert kl < 0.95 * uniform
    assert result.allocation and result.allocation["file_tokens"] == 126
    assert 0.3 < result.allocation["file_kl"] / result.allocation["expected"] < 3
    assert any(note.startswith("KL ") for note in result.notes) and not any("allocated" in n for n in result.notes)
    told = json.loads((tmp_path / "a.gguf.quantization.json").read_text())
    assert told["allocation"]["codecs"][TIED] == containers.open(result.path).entries[TIED].codec.name
    again = fewbits.quantize(tiny, tmp_path / "b.gguf", str(tmp_path / "a.gguf.recipe.toml"), calibration=english,
                             solver="search", length=64)
    assert [(t["name"], t["codec"]) for t in again.tensors] == [(t["name"], t["codec"]) for t in result.tensors]


@pytest.mark.parametrize("name", ["a.gguf", "a"])
def test_a_size_is_that_of_the_file(name: str, tiny: Path, tmp_path: Path, english: Path) -> None:
    smaller = fewbits.quantize(tiny, tmp_path / f"smaller-{name}", "Q4_0" if name == "a.gguf" else "int4-g32",
                               calibration="none").nbytes
    result = fewbits.quantize(tiny, tmp_path / name, Target(nbytes=smaller + 5000), calibration=english, length=64,
                              solver="search", container=None if name == "a.gguf" else "gptq")
    assert smaller < result.nbytes <= smaller + 5000


def test_parts_that_are_computed_as_one_share_a_codec(tiny: Path, english: Path) -> None:
    source = containers.open(tiny)
    facts = {f.name: f for f in ModelFacts.of(source).tensors}
    least = Room(source, Target(bits=16), "gptq", None)
    found = share(source, 8.0, english, "gptq").codecs
    for i in range(2):
        for roles in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
            assert len({found[f"model.layers.{i}.{role}_proj.weight"] for role in roles}) == 1
    assert len(set(found.values())) > 1 and TIED not in found
    assert {len(several) for several in least.units.values()} == {1, 2, 3} and facts.keys() >= found.keys()


def test_a_tied_embedding_is_one_tensor_and_an_override_is_kept(tiny: Path, english: Path) -> None:
    source = containers.open(tiny)
    found = share(source, 8.0, english, overrides=[f"{TIED}=Q5_1"])
    assert found.codecs[TIED] == "Q5_1" and "lm_head.weight" not in found.codecs
    choices = {c.name: c.codec.name for c in found.recipe.resolve(ModelFacts.of(source), [f"{TIED}=Q5_1"])}
    assert {n: choices[n] for n in found.codecs} == found.codecs
    assert choices["model.layers.0.mlp.down_proj.weight"] == "F16" and choices["model.norm.weight"] == "F32"


def test_rounds_are_told_and_the_best_is_taken(tiny: Path, english: Path) -> None:
    found = share(containers.open(tiny), 7.5, english, weigh=True)
    assert found.kl == min(r["kl"] for r in found.rounds) and found.bits_per_weight <= 7.5
    assert "recipe" not in found.to_json() and json.dumps(found.to_json())


@pytest.mark.parametrize("kind", ["bits", "nbytes"])
def test_below_the_smallest_size_it_is_said_what_that_is(kind: str, tiny: Path, tmp_path: Path) -> None:
    small = Target(bits=2.0) if kind == "bits" else Target(nbytes=30_000)
    with pytest.raises(FewbitsError, match="below the smallest possible size in gguf") as error:
        fewbits.quantize(tiny, tmp_path / "a.gguf", small)
    found = re.search(r"in gguf, ([\d.]+) (bits per weight|bytes)$", str(error.value))
    assert found and not list(tmp_path.iterdir())
    enough = Target(bits=float(found[1]) + 0.01) if kind == "bits" else Target(nbytes=int(found[1]))
    assert Room(containers.open(tiny), enough, "gguf", None).asked


def test_containers_without_a_choice(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="cannot be shared out in mxfp4"):
        fewbits.quantize(tiny, tmp_path / "a", "4bpw", container="mxfp4")


def test_recipe_of_a_target_is_an_ordinary_one(tiny: Path, english: Path, tmp_path: Path) -> None:
    from fewbits.recipe import file

    found = share(containers.open(tiny), 8.0, english)
    path = tmp_path / "r.toml"
    path.write_text(file.text(found.recipe))
    facts = ModelFacts.of(containers.open(tiny))
    assert [(c.name, c.codec) for c in get(str(path)).resolve(facts)] == [
        (c.name, c.codec) for c in found.recipe.resolve(facts)]
