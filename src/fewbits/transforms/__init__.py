"""Transforms: an equivalent model that quantizes better, made before any solver sees it."""

from __future__ import annotations

from fewbits.calibration.sources import Calibration
from fewbits.checkpoint import Checkpoint
from fewbits.containers import experts
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError
from fewbits.jobs.distributed import Ranks
from fewbits.jobs.store import Store
from fewbits.recipe import Choice
from fewbits.transforms import awq
from fewbits.transforms.scaling import scaled
from fewbits.transforms.sites import sites

TRANSFORMS = {"awq": awq.scales}  # each finds the scales of a model's sites

__all__ = ["TRANSFORMS", "apply", "check"]


def check(name: str, source: Checkpoint) -> None:
    """Whether the transform is there and knows the family.

    Raises:
        FewbitsError: it is not, or does not.
    """
    if name not in TRANSFORMS:
        raise FewbitsError(f"unknown transform {name!r}", "one of: " + ", ".join(TRANSFORMS))
    sites(source)


def apply(name: str, source: Checkpoint, choices: list[Choice], calibration: Calibration,
          progress: Progress | None = None, ranks: Ranks | None = None, store: Store | None = None) -> Checkpoint:
    """The checkpoint transformed for what `choices` will make of it: a model of equal outputs, for any solver.

    Changed tensors are float32 and made when they are loaded, all others are untouched. Experts must still be stacked
    in `source`. The scales are kept in `store`, so that a run that resumes has the same.

    Raises:
        FewbitsError: as for `check`.
    """
    from safetensors.torch import load, save

    check(name, source)
    ranks, found = ranks or Ranks(), sites(source)
    known = ranks.broadcast(store.read(name) if store else None)
    if known is None:
        by_name = {experts.stack_of(c.name): c for c in choices}
        batches = ranks.share(calibration.batches)
        known = ranks.broadcast(save(TRANSFORMS[name](source, found, by_name, batches, progress, ranks.combine)))
        if store:
            store.write(name, known)
    scales = load(known)
    return scaled(source, [(s, scales[s.producer]) for s in found if s.producer in scales],
                  {c.name: c.codec for c in choices})
