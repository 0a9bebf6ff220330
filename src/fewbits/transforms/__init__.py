"""Transforms: an equivalent model that quantizes better, made before any solver sees it."""

from __future__ import annotations

from collections.abc import Callable

from fewbits.checkpoint import Checkpoint
from fewbits.containers import experts
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError
from fewbits.recipe import Choice
from fewbits.sources import Calibration
from fewbits.statistics import Found
from fewbits.transforms import awq
from fewbits.transforms.scaling import scaled
from fewbits.transforms.sites import sites

TRANSFORMS = {"awq": awq.scales}  # each finds the scales of a model's sites

__all__ = ["TRANSFORMS", "apply"]


def apply(name: str, source: Checkpoint, choices: list[Choice], calibration: Calibration,
          progress: Progress | None = None, combine: Callable[[Found], None] | None = None) -> Checkpoint:
    """The checkpoint transformed for what `choices` will make of it: a model of equal outputs, for any solver.

    Changed tensors are float32 and made when they are loaded, all others are untouched. Experts must still be stacked
    in `source`; `combine` is that of `calibrate.Walk`.

    Raises:
        FewbitsError: no such transform, or none for this family.
    """
    if name not in TRANSFORMS:
        raise FewbitsError(f"unknown transform {name!r}", "one of: " + ", ".join(TRANSFORMS))
    by_name = {experts.stack_of(c.name): c for c in choices}
    found = TRANSFORMS[name](source, sites(source), by_name, calibration, progress, combine)
    return scaled(source, found, {c.name: c.codec for c in choices})
