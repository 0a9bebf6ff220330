"""Transforms: an equivalent model that quantizes better, made before any solver sees it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from fewbits.calibration.sources import Calibration
from fewbits.checkpoint import Checkpoint
from fewbits.containers import experts
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError
from fewbits.jobs.distributed import Ranks
from fewbits.jobs.store import Store
from fewbits.lazy import torch
from fewbits.recipe import Choice
from fewbits.transforms import awq, smoothquant
from fewbits.transforms.scaling import scaled
from fewbits.transforms.sites import sites

# each finds the scales of a model's sites; `smoothquant:0.8` says another alpha than its own
TRANSFORMS = {"awq": awq.scales, "smoothquant": smoothquant.scales}

__all__ = ["TRANSFORMS", "apply", "check"]


def check(name: str, source: Checkpoint) -> None:
    """Whether the transform is there and knows the family.

    Raises:
        FewbitsError: it is not, or does not.
    """
    _named(name)
    sites(source)


def _named(name: str) -> Callable[..., dict[str, torch.Tensor]]:
    kind, colon, alpha = name.partition(":")
    if kind not in TRANSFORMS or (colon and kind != "smoothquant"):
        raise FewbitsError(f"unknown transform {name!r}", "one of: " + ", ".join(TRANSFORMS))
    if not colon:
        return TRANSFORMS[kind]
    if not re.fullmatch(r"0?\.\d+|0|1(\.0+)?", alpha):
        raise FewbitsError(f"transform {name}: alpha {alpha!r}", "a number from 0 to 1: smoothquant:0.8")
    return partial(smoothquant.scales, alpha=float(alpha))


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
        known = ranks.broadcast(save(_named(name)(source, found, by_name, batches, progress, ranks.combine)))
        if store:
            store.write(name, known)
    scales = load(known)
    return scaled(source, [(s, scales[s.producer]) for s in found if s.producer in scales],
                  {c.name: c.codec for c in choices})
