"""All that decides what a comparison measures, and how; and the commands that repeat it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbits import __version__
from fewbits.checks.checksums import of_files

TEXT = "wikitext2-test"  # where no text is given


@dataclass(frozen=True)
class Settings:
    """Of the quantizing, of each kind of measurement, and of the recommendation."""

    solver: str | None = None
    calibration: str | None = None
    samples: int = 64
    seed: int = 0
    text: str | None = None  # a file; without, the test part of wikitext2
    chunks: int = 20
    context: int = 512
    tasks: tuple[str, ...] = ()
    task_files: str | None = None
    limit: int | None = 200
    speed: bool = True
    prompt: int = 512
    generate: int = 64
    repeats: int = 5
    threads: int | None = None
    memory_bytes: int | None = None

    @property
    def making(self) -> dict[str, Any]:
        """What decides a quantized file, beside the model and the recipe."""
        return {"solver": self.solver, "calibration": content(self.calibration), "samples": self.samples,
                "seed": self.seed, "version": __version__}


def content(spec: str | None) -> str | None:
    """A file by the hash of its content; a name as it is."""
    file = Path(spec) if spec else None
    return next(iter(of_files([file]).values())) if file and file.is_file() else spec


def commands(model: str, to: Sequence[str], folder: Path, s: Settings) -> tuple[str, ...]:
    """What to type to repeat the comparison, and each of its parts by itself."""
    making = _options(("solver", s.solver), ("calibration", s.calibration),
                      ("samples", s.samples if s.samples != Settings.samples else None), ("seed", s.seed or None))
    whole = _options(("to", ",".join(to)), ("text", s.text), ("chunks", s.chunks), ("context", s.context),
                     ("tasks", ",".join(s.tasks) or None), ("task-files", s.task_files),
                     ("limit", s.limit if s.tasks else None), ("memory", s.memory_bytes))
    speed = _options(("prompt", s.prompt), ("generate", s.generate), ("repeats", s.repeats), ("threads", s.threads))
    name, out = shlex.quote(model), shlex.quote(str(folder))
    text = shlex.quote(s.text or str(folder / f"{TEXT}.txt"))
    return (f"fewbits compare {name}{whole}{making}{speed if s.speed else ' --no-speed'} -o {out}",
            f"fewbits quantize {name} --to RECIPE{making} -o FILE",
            f"fewbits eval FILE --against {name} --perplexity {text} --chunks {s.chunks} --context {s.context}",
            *([f"fewbits bench FILE{speed}"] if s.speed else []))


def _options(*pairs: tuple[str, Any]) -> str:
    return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in pairs if value is not None)
