"""Files that speed is measured on: a model in a recipe, made once, without calibration text."""

from __future__ import annotations

from pathlib import Path

from baselines import f16_gguf

import fewbits


def directory(model: Path, work: Path, recipe: str) -> Path:
    """In the recipe's own container."""
    return _made(model, work / f"{model.name}-{recipe}", recipe)


def plain_gguf(model: Path, work: Path, mix: str) -> Path:
    """From the model in 16 bits, which is one of the files."""
    source = f16_gguf(model, work)
    return source if mix == "F16" else _made(source, work / f"{model.name}-{mix}-plain.gguf", mix)


def _made(source: Path, out: Path, recipe: str) -> Path:
    if not out.exists():
        fewbits.quantize(source, out, recipe, calibration="none", finish="off")
    return out
