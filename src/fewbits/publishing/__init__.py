"""`push`: a model to the Hugging Face hub, with a card that says what it is, and checksums."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fewbits import containers
from fewbits.checkpoint import Checkpoint
from fewbits.checks import checksums
from fewbits.codecs.floats import Float
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError
from fewbits.measure.report import PICTURES
from fewbits.publishing import card
from fewbits.publishing.card import Facts
from fewbits.publishing.upload import File, check, upload

CARD, SUMS = "README.md", "SHA256SUMS"
CONTEXT = 512  # tokens of a window that is measured on
_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Published:
    """What went to the hub; of a dry run what would have, and the folder with card and checksums."""

    repository: str
    url: str | None
    files: dict[str, str]  # SHA-256 of each but the card and the list of them
    nbytes: int
    folder: Path | None
    seconds: float
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": self.folder and str(self.folder)}


def push(model: str | Path, repository: str, *, base_model: str | None = None, license: str | None = None,
         against: str | Path | None = None, text: str | Path | None = None, chunks: int | None = 8,
         measured: str | Path | None = None, report: str | Path | None = None, own_card: str | Path | None = None,
         private: bool = False, revision: str | None = None, dry_run: bool = False, out: str | Path | None = None,
         progress: Progress | None = None) -> Published:
    """Publish `model`, a local path in any format, as `repository` (`org/name`).

    The card says its base model, recipe, bits per weight, and how to load it where its layout is read; and its
    divergence: as in `measured` (what `fewbits eval --json` said), or in `report` (the directory of a comparison, whose
    pictures come along), or measured now on `text`, from the model `against`. `own_card` is taken instead of it.

    A dry run leaves card, checksums and pictures in the folder `out` (`MODEL.card`), and asks nothing of the network.
    Otherwise the token is where huggingface_hub finds it; files that are there already are not sent again.

    Raises:
        FewbitsError: no model, no token, no network, or the hub's refusal.
    """
    began, path = time.monotonic(), Path(model)
    check(repository, token=not dry_run)
    source = containers.open(path)
    folder = Path(out) if out is not None else path.resolve().with_name(f"{path.resolve().name}.card")
    if dry_run and folder.exists() and not (folder.is_dir() and {f.name for f in folder.iterdir()} <= {
            CARD, SUMS, *PICTURES}):
        raise FewbitsError(f"{folder}: exists already", "remove it, or give another name with -o")
    notes: list[str] = []
    pictures = [] if report is None else _pictures(Path(report))
    files = [f for f in checksums.files_of(path, source) if f.name not in (CARD, SUMS) and not f.name.startswith(".")]
    found = _facts(source, repository, files, base_model, license)
    if found.base_model is None:
        notes.append("the card names no base model: --base-model says it")
    quality = _quality(found, source, measured, report, against, text, chunks, progress)
    if quality is None:
        notes.append("the card has no divergence: --measured, --report or --against says or measures it")
    readme = Path(own_card).read_text(encoding="utf-8") if own_card else card.render(
        found, quality, [p.name for p in pictures], None if report is None else Path(report) / "report.md")
    sums = checksums.of_files([*files, *pictures], progress)
    written: list[File] = [(CARD, readme.encode()), (SUMS, checksums.text(sums, {}).encode())]
    size = sum(f.stat().st_size for f in files)
    if dry_run:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in [*written, *((p.name, p.read_bytes()) for p in pictures)]:
            assert isinstance(data, bytes)
            (folder / name).write_bytes(data)
        return Published(repository, None, sums, size, folder, time.monotonic() - began, notes)
    url = upload(repository, [*((f.name, f) for f in [*files, *pictures]), *written], private=private,
                 revision=revision, message=f"{found.recipe} by fewbits", progress=progress)
    return Published(repository, url, sums, size, None, time.monotonic() - began, notes)


# what is known of the model -------------------------------------------------------------------------------------------
def _facts(source: Checkpoint, repository: str, files: list[Path], base: str | None, license: str | None) -> Facts:
    told = _summary(source)
    kinds: dict[str, tuple[int, int, int]] = {}
    for e in source.entries.values():
        count, weights, size = kinds.get(e.codec.name, (0, 0, 0))
        kinds[e.codec.name] = count + 1, weights + e.parameters, size + e.nbytes
    packed = {e.codec.name for e in source.entries.values() if not isinstance(e.codec, Float)}
    common = max(packed or kinds, key=lambda n: kinds[n][1])
    metadata = source.facts.get("metadata") or {}

    def value(key: str) -> Any:
        return getattr(metadata.get(key), "value", None)

    named = str(source.config.get("_name_or_path") or "")
    url = str(value("general.base_model.0.repo_url") or "").removeprefix("https://huggingface.co/")
    guesses = [n for n in (url, named) if _ID.fullmatch(n) and not Path(n).exists()]
    return Facts(repository=repository, architecture=source.architecture, container=source.container,
                 recipe=str(told.get("recipe") or source.facts.get("recipe") or common),
                 calibration=told.get("calibration"),
                 solvers=sorted({str(t["solver"]) for t in told.get("tensors", ()) if t.get("solver")}),
                 quantized=bool(packed), parameters=source.parameters,
                 bits_per_weight=source.nbytes * 8 / max(1, source.parameters),
                 nbytes=sum(f.stat().st_size for f in files), files=[f.name for f in files], kinds=kinds,
                 base_model=base or next(iter(guesses), None), license=license or value("general.license"))


def _summary(source: Checkpoint) -> dict[str, Any]:
    """What quantizing left beside the model."""
    file = source.path.with_name(f"{source.path.name}.quantization.json")
    if not file.is_file():
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _pictures(report: Path) -> list[Path]:
    if not (report / "report.json").is_file():
        raise FewbitsError(f"{report}: no report.json in it", "give the directory that fewbits compare wrote")
    return [report / name for name in PICTURES if (report / name).is_file()]


def _quality(facts: Facts, source: Checkpoint, measured: str | Path | None, report: str | Path | None,
             against: str | Path | None, text: str | Path | None, chunks: int | None,
             progress: Progress | None) -> dict[str, Any] | None:
    """The figures of an evaluation: given, of a report, or measured now."""
    if against is not None or text is not None:
        if against is None or text is None:
            raise FewbitsError("--against and --text go together", "divergence is from a model, on a text")
        from fewbits.calibration.sources import fitting
        from fewbits.measure import evaluate

        return evaluate(source, against, text=text, chunks=chunks, context=fitting(CONTEXT, source)[0],
                        progress=progress).to_json()
    if measured is not None:
        return _read(Path(measured))
    if report is None:
        return None
    rows = _read(Path(report) / "report.json").get("candidates", [])
    name = source.path.name
    mine = [r for r in rows if r.get("quality") and (Path(r.get("path") or "-").name == name)] or [
        r for r in rows if r.get("quality") and r.get("name") == facts.recipe]
    return mine[0]["quality"] if mine else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FewbitsError(f"{path}: {error.strerror}", "give what fewbits eval --json printed") from error
    except ValueError as error:
        raise FewbitsError(f"{path}: no JSON: {error}", "give what fewbits eval --json printed") from error
    if not isinstance(found, dict):
        raise FewbitsError(f"{path}: not an object", "give what fewbits eval --json printed")
    return found
