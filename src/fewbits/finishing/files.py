"""`finish`: a quantized file that is there already, whoever made it, brought nearer to its original."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewbits import __version__, containers, hub
from fewbits.calibration import sources
from fewbits.calibration.sources import Batch, Calibration
from fewbits.checkpoint import Checkpoint
from fewbits.containers.base import Progress, check_output, check_space, write
from fewbits.errors import FewbitsError
from fewbits.finishing import asked, sequences, tune
from fewbits.jobs.store import Store, identity, resumable


@dataclass(frozen=True)
class Finished:
    """What was written."""

    path: Path
    container: str
    calibration: str
    seconds: float
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def finish(model: str | Path | Checkpoint, out: str | Path, original: str | Path | Checkpoint, *,
           level: str = "quick", calibration: str | Path | Calibration | Sequence[Batch] = "self",
           samples: int | None = None, length: int = 512, seed: int = 0,
           progress: Progress | None = None) -> Finished:
    """Tune scales, norms and biases of the quantized `model` towards `original`; `out` has the same layout.

    See `sources.calibration` for what it is tuned on. A killed run resumes when called again.

    Raises:
        FewbitsError: nothing in it can be tuned, it is no quantization of `original`, its layout is only read.
    """
    began = time.monotonic()
    if not asked(level):
        raise FewbitsError("--finish off leaves the file as it is", "take quick or thorough")
    source, quantized = (m if isinstance(m, Checkpoint) else containers.open(hub.locate(m)) for m in (original, model))
    out = Path(out).resolve()
    check_output(out, quantized.path)
    if not any(e.codec.linear for e in quantized.entries.values()):
        kinds = ", ".join(sorted({e.codec.name for e in quantized.entries.values()}))
        raise FewbitsError(f"{quantized.path}: nothing in it can be tuned: {kinds}",
                           "fewbits quantize makes a file that can")
    check_original(source, quantized)
    target = containers.by_name(quantized.container)
    refusal = target.refusal(quantized)
    if refusal:
        raise FewbitsError(f"{target.name} cannot be written with {refusal[0].name}: {refusal[1]}")
    check_space(out.parent, 2 * quantized.nbytes)
    used = sources.calibration(calibration, source, samples=samples or sequences(level), length=length, seed=seed,
                               progress=progress)
    folder = out.with_name(f".{out.name}.work")
    with resumable(folder):
        store = Store(folder, {"model": identity(quantized), "original": identity(source), "finish": level,
                               "calibration": used.digest(), "version": __version__})
        tuned, notes = tune(source, quantized, used, level, store, progress, seed)
        write(target, out, tuned, progress)
        store.clear()
    return Finished(out, target.name, used.description, time.monotonic() - began, [*used.notes, *notes])


def check_original(source: Checkpoint, quantized: Checkpoint) -> None:
    """Refuse a file that can be no quantization of `source`: names or shapes differ."""
    for name, entry in quantized.entries.items():
        other = source.entries.get(name)
        if other is None or sorted(other.shape) != sorted(entry.shape):  # some files transpose
            found = "no such tensor" if other is None else f"{list(other.shape)}, not {list(entry.shape)}"
            raise FewbitsError(f"{quantized.path} is no quantization of {source.path}: {name} there: {found}",
                               "give the model that it was made from")
