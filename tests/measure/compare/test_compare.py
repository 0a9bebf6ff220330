"""The whole comparison on a tiny model: what is measured, what is reused, what becomes of what fails."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

import fewbits
from fewbits import containers
from fewbits.errors import FewbitsError
from fewbits.measure.compare import Comparison, cases, compare, layers, work
from fewbits.measure.divergence import evaluate

SMALL = {"chunks": 2, "context": 64, "calibration": "none", "prompt": 8, "generate": 4, "repeats": 1}
RECIPES = ["Q8_0", "nf4", "int3-g32-asym"]


@dataclass
class Timed:
    """A stand-in for a row of `bench`."""

    candidate: str
    prompt: int
    prefill_tokens_per_second: float = 100.0
    decode_tokens_per_second: float | None = 10.0
    first_token_seconds: float = 0.1
    resident_bytes: int = 10**6
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each measurement ran; speed is not measured really."""
    import fewbits.measure as measure
    import fewbits.quantizing as quantizing

    found: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            found[name] += 1
            return function(*arguments, **options)
        return call

    def bench(models: Sequence[Path], prompts: Sequence[int], **_: Any) -> list[Timed]:
        found["timed models"] += len(models)
        return [Timed(str(m), *prompts) for m in models]

    monkeypatch.setattr(quantizing, "quantize", counted("quantize", quantizing.quantize))
    monkeypatch.setattr(measure, "evaluate", counted("evaluate", measure.evaluate))
    monkeypatch.setattr(layers, "errors", counted("layers", layers.errors))
    monkeypatch.setattr(measure, "bench", counted("bench", bench), raising=False)
    yield found


def run(model: Path, out: Path, text: Path, to: Sequence[str] = RECIPES, **settings: Any) -> Comparison:
    return compare(model, to, out=out, text=str(text), **{**SMALL, **settings})


def test_from_a_model_to_its_report(tiny: Path, tmp_path: Path, english: Path, calls: Counter[str]) -> None:
    seen: list[tuple[str, int, int]] = []
    found = run(tiny, tmp_path / "out", english, progress=lambda *a: seen.append(a))
    assert [c.kind for c in found.candidates] == ["original", "recipe", "recipe", "recipe"]
    assert [c.nbytes for c in found.candidates[1:]] == sorted(c.nbytes for c in found.candidates[1:])
    by_name = {c.name: c for c in found.candidates}
    q8 = by_name["Q8_0"]
    again = evaluate(q8.path, tiny, text=english, chunks=2, context=64)
    assert q8.kl == pytest.approx(again.kl_mean) and q8.top1 == pytest.approx(again.top1)
    assert q8.nbytes == Path(q8.path).stat().st_size and q8.container == "gguf"
    assert q8.kl < by_name["nf4"].kl < by_name["int3-g32-asym"].kl
    assert found.original.quality["perplexity"] == pytest.approx(again.reference_perplexity)
    assert all(c.speed and c.layers for c in found.candidates[1:]) and found.original.speed
    assert calls == {"quantize": 3, "evaluate": 4, "layers": 3, "bench": 1, "timed models": 4}
    done = [d for _, d, _ in seen]
    assert done == sorted(done) and seen[-1][1] == seen[-1][2]

    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [c["name"] for c in told["candidates"]] == list(by_name)
    assert told["circumstances"]["models"][0]["sha256"] and told["circumstances"]["text"]["sha256"]
    assert told["advice"][0]["take"] in by_name
    for name in ("report.html", "report.md", "quality-size.png", "speed.png", "layers.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_nothing_is_measured_twice(tiny: Path, tmp_path: Path, english: Path, calls: Counter[str]) -> None:
    first = run(tiny, tmp_path, english)
    calls.clear()
    second = run(tiny, tmp_path, english)
    assert not calls and second.candidates == first.candidates
    run(tiny, tmp_path, english, prompt=9)
    assert calls == {"bench": 1, "timed models": 4}
    calls.clear()
    other = tmp_path / "other.txt"
    other.write_text(english.read_text()[100:])
    run(tiny, tmp_path, other, prompt=9)
    assert calls == {"evaluate": 4}
    calls.clear()
    run(tiny, tmp_path, other, prompt=9, to=[*RECIPES, "Q4_0"])
    assert calls == {"quantize": 1, "evaluate": 1, "layers": 1, "bench": 1, "timed models": 1}
    calls.clear()
    run(tiny, tmp_path, other, prompt=9, to=["Q8_0"], solver="nearest")
    assert calls == {"quantize": 1, "evaluate": 1, "layers": 1, "bench": 1, "timed models": 1}


def test_a_killed_run_goes_on(tiny: Path, tmp_path: Path, english: Path, calls: Counter[str],
                              monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> Any:
        if calls["evaluate"] == 2:
            raise KeyboardInterrupt
        return real(*_)

    real = layers.errors
    monkeypatch.setattr(layers, "errors", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path, english)
    assert calls == {"quantize": 2, "evaluate": 2, "layers": 1}
    monkeypatch.setattr(layers, "errors", real)
    calls.clear()
    assert len(run(tiny, tmp_path, english).measured) == 3
    assert calls["quantize"] == 1 and calls["evaluate"] == 2


def test_a_file_made_under_other_settings_is_not_taken_for_this_one(tiny: Path, tmp_path: Path, english: Path,
                                                                    calls: Counter[str]) -> None:
    first = run(tiny, tmp_path, english, to=["nf4"], speed=False)
    def die(*_: Any) -> Any:
        raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(work, "inspect", die)  # the file is there, its making not yet recorded
        run(tiny, tmp_path, english, to=["nf4"], speed=False, solver="nearest")
    again = run(tiny, tmp_path, english, to=["nf4"], context=50, speed=False)
    assert calls["quantize"] == 3
    want = evaluate(again.candidates[1].path, tiny, text=english, chunks=2, context=50)
    assert again.measured[0].kl == pytest.approx(want.kl_mean)
    assert again.measured[0].layers == first.measured[0].layers


def test_a_failure_is_a_row_and_the_others_go_on(tiny: Path, tmp_path: Path, english: Path,
                                                 calls: Counter[str]) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text('base = "Q8_0"\n[tensors]\n"nothing.like.it" = "Q4_0"\n')
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF, but not for long")
    found = run(tiny, tmp_path / "out", english, to=[str(bad), "Q8_0", str(broken)])
    by_name = {c.name: c for c in found.candidates}
    assert "nothing.like.it" in by_name["bad"].reason and by_name["broken"].reason
    assert by_name["Q8_0"].kl is not None and by_name["Q8_0"].speed and not by_name["bad"].speed
    assert [c.name for c in found.candidates][1] == "Q8_0", "what could not be measured comes last"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "nothing.like.it" in page and "nothing.like.it" in (tmp_path / "out" / "report.md").read_text()
    assert found.advice[0].take == "Q8_0"


def test_speed_that_cannot_be_measured(tiny: Path, tmp_path: Path, english: Path, calls: Counter[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def bench(models: Sequence[Path], prompts: Sequence[int], **_: Any) -> list[Timed]:
        if tiny in models:
            raise FewbitsError("too large for the free memory")
        return [Timed(str(m), *prompts, decode_tokens_per_second=None, reason="the worker died")
                if m.suffix == ".gguf" else Timed(str(m), *prompts) for m in models]

    monkeypatch.setattr("fewbits.measure.bench", bench)
    found = {c.name: c for c in run(tiny, tmp_path, english, to=["Q8_0", "nf4"]).candidates}
    assert found["tiny"].speed_reason == "too large for the free memory"
    assert found["Q8_0"].speed_reason == "the worker died" and found["Q8_0"].kl is not None
    assert found["nf4"].quick("decode_tokens_per_second") == 10.0


def test_files_are_only_measured(tiny: Path, tmp_path: Path, english: Path, calls: Counter[str]) -> None:
    file = fewbits.quantize(tiny, tmp_path / "mine.gguf", "Q8_0").path
    calls.clear()
    found = run(tiny, tmp_path / "out", english, to=[str(file)], keep=False)
    assert calls["quantize"] == 0 and file.exists() and found.candidates[1].kind == "file"
    assert found.candidates[1].name == "mine" and found.candidates[1].kl > 0


def test_files_that_are_not_kept(tiny: Path, tmp_path: Path, english: Path, calls: Counter[str]) -> None:
    run(tiny, tmp_path, english, to=["Q8_0", "nf4"], keep=False)
    assert not list((tmp_path / "models").iterdir())
    calls.clear()
    run(tiny, tmp_path, english, to=["Q8_0", "nf4"], keep=False)
    assert not calls
    run(tiny, tmp_path, english, to=["Q8_0"], keep=False, context=60)
    assert calls == {"quantize": 1, "evaluate": 2}, "made again to be measured again"


def test_a_file_of_somebody_else_is_left_alone(tiny: Path, tmp_path: Path, english: Path,
                                               calls: Counter[str]) -> None:
    (tmp_path / "models").mkdir()
    theirs = tmp_path / "models" / "tiny-Q8_0.gguf"
    theirs.write_text("theirs")
    found = run(tiny, tmp_path, english, to=["Q8_0", "nf4"], keep=False)
    assert theirs.read_text() == "theirs"
    assert "exists already" in next(c.reason for c in found.candidates if c.name == "Q8_0")


def test_what_is_refused(tiny: Path, tmp_path: Path, english: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FewbitsError, match="unknown recipe 'Q4_KM'"):
        run(tiny, tmp_path, english, to=["Q4_KM"])
    with pytest.raises(FewbitsError, match="no setting 'chunk'"):
        compare(tiny, ["Q8_0"], out=tmp_path, text=str(english), chunk=3)
    with pytest.raises(FewbitsError, match="nowhere.txt: no such file"):
        run(tiny, tmp_path, Path("nowhere.txt"))

    def unreachable(*_: Any) -> Any:
        raise FewbitsError("wikitext2-test: the hub cannot be reached", "something else")

    monkeypatch.setattr("fewbits.calibration.documents.named", unreachable)
    with pytest.raises(FewbitsError, match="cannot be reached") as error:
        compare(tiny, ["Q8_0"], out=tmp_path)
    assert "--text FILE" in error.value.hint


def test_names_of_cases(tiny: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.gguf").write_text("")
        (tmp_path / folder / "Q8_0.toml").write_text('base = "Q8_0"')
    given = ["q4_k_m", "Q4_K_M", "Q8_0", *(str(tmp_path / f / n) for n in ("Q8_0.toml", "same.gguf") for f in "ab")]
    found = list(cases.considered(given, containers.open(tiny), tmp_path))
    assert [c.name for c in found] == ["tiny", "Q4_K_M", "Q8_0", given[3], given[4], "same", "same.gguf"]
    assert len({c.kept.file for c in found}) == len({c.path for c in found}) == len(found)
    assert [c.kind for c in found] == ["original"] + 4 * ["recipe"] + 2 * ["file"]
    (_, target) = cases.considered(["4.25bpw"], containers.open(tiny), tmp_path)
    assert (target.name, target.to, target.path.name) == ("4.25bpw", "4.25bpw", "tiny-4.25bpw.gguf")
    for name, told in (("tiny-Q4_0.gguf", "Q4_0"), ("Tiny.Q4_0.gguf", "Q4_0"), ("tinyer.gguf", "tinyer")):
        (tmp_path / name).write_text("")
        assert list(cases.considered([str(tmp_path / name)], containers.open(tiny), tmp_path))[1].name == told


def test_recipes_that_suit(tiny: Path, tmp_path: Path, model: Callable[[str], Path]) -> None:
    found = cases.suitable(containers.open(tiny))
    assert "Q8_0" in found and "int4-g32" in found, "groups of 64 do not divide 96"
    kept = cases.suitable(containers.open(fewbits.quantize(tiny, tmp_path / "q", "int4-g32", calibration="none").path))
    assert "Q8_0" not in kept, "no more bits than the model has"
    wide = cases.suitable(containers.open(model("smollm2-135m-wide")))
    assert 12 <= len(wide) <= 14 and "int4-g128" in wide
