"""`compare`: one model in many formats, each quantized, measured and set beside the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fewbits import containers, hub
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError
from fewbits.measure.circumstances import circumstances
from fewbits.measure.compare import choosing
from fewbits.measure.compare.candidates import Candidate, Comparison
from fewbits.measure.compare.cases import considered, suitable, text_file
from fewbits.measure.compare.settings import Settings, commands, content
from fewbits.measure.compare.work import Work

__all__ = ["Candidate", "Comparison", "Settings", "compare"]


def compare(model: str | Path, to: Sequence[str] | None = None, *, out: str | Path, keep: bool = True,
            progress: Progress | None = None, **settings: Any) -> Comparison:
    """Quantize `model` into each recipe of `to` (existing files are only measured), measure quality, speed and the
    error of each weight, and write the report into the directory `out`: `report.html`, `.json`, `.md` and pictures.

    `settings` are those of `Settings`. Without `to` a dozen recipes that suit the model are taken. What was measured
    under the same circumstances is read from `out`, so that a killed run goes on, and a changed one measures only what
    changed. The quantized files stay in `out/models` unless `keep` is false. What cannot be done with one candidate
    becomes its reason, and the others go on.

    Raises:
        FewbitsError: nothing readable at `model`, an unknown recipe or setting, no text to measure on.
    """
    from fewbits.measure import report

    unknown = sorted(settings.keys() - Settings.__dataclass_fields__.keys())
    if unknown:
        raise FewbitsError(f"compare has no setting {unknown[0]!r}", ", ".join(Settings.__dataclass_fields__))
    chosen = Settings(**settings)
    source = containers.open(hub.locate(model))
    recipes = list(dict.fromkeys(to)) if to else suitable(source)
    folder = Path(out)
    cases = list(considered(recipes, source, folder))
    for each in (folder / "models", folder / "measured"):
        each.mkdir(parents=True, exist_ok=True)
    text = text_file(chosen.text, folder)
    if chosen.tasks:  # what is wrong with them is known before the hours begin
        from fewbits.measure.tasks import needs, questions

        needs.installed()
        for name in chosen.tasks:
            questions.questions(name, chosen.task_files, chosen.limit, None)
    Work(source, cases, chosen, text, progress).run()
    first, *rest = (Candidate(case.name, case.kind, str(case.path), **case.fields) for case in cases)
    if not keep:
        for case in cases:
            case.forget()
    rest.sort(key=lambda c: (c.kl is None, c.nbytes))
    found = Comparison(
        str(model), source.architecture, source.parameters, (first, *rest),
        tuple(c.name for c in choosing.frontier(rest)), tuple(choosing.advise(first, rest, chosen.memory_bytes)),
        asdict(chosen), commands(str(model), recipes, folder, chosen),
        circumstances(source, text={"name": text.name, "sha256": content(str(text))}, seed=chosen.seed),
        datetime.now(timezone.utc).isoformat(timespec="seconds"), folder)
    report.write(found, folder)
    return found
