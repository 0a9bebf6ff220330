"""SmoothQuant (Xiao et al., 2023): what activations have too much of moves into the weights that they meet.

Activations that are rounded to int8 with one scale a token, or one a layer, lose most where a few channels are much
larger than the rest. After every norm, channel j is divided by max|x_j|^alpha / max|w_j|^(1 - alpha), the weights that
read it are multiplied by that. What comes from other layers than norms is left alone, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fewbits.calibration.statistics import Experts, Found, Statistics
from fewbits.calibration.walk import Batches, Walk
from fewbits.checkpoint import Checkpoint
from fewbits.containers.base import Progress
from fewbits.lazy import torch
from fewbits.recipe import Choice
from fewbits.transforms.sites import Site

ALPHA = 0.5


def scales(source: Checkpoint, sites: list[Site], choices: Mapping[str, Choice], batches: Batches,
           progress: Progress | None = None, combine: Callable[[Found], None] | None = None,
           alpha: float = ALPHA) -> dict[str, torch.Tensor]:
    """Norm -> its scale `[out]`, of every site with a consumer that is quantized; `combine` is that of the walk."""
    found: dict[str, torch.Tensor] = {}
    walk = Walk(source, batches, combine=combine)
    for block in walk:
        here = [s for s in sites if s.consumers[0].startswith(block.prefix)
                and len(source.entries[s.producer].shape) == 1
                and any(c in choices and choices[c].solver for c in s.consumers)]
        statistics = block.statistics() if here else {}
        for site in here:
            seen = [_peak(statistics[c]) for c in site.consumers if c in statistics]
            if seen:
                found[site.producer] = _scale(torch.stack(seen).amax(0), _columns(site, source), alpha)
        if progress:
            progress("smoothing", block.index + 1, len(walk))
    return found


def _peak(found: Found) -> torch.Tensor:
    parts = found.parts if isinstance(found, Experts) else [found]
    peaks = [p.peak for p in parts if isinstance(p, Statistics) and p.peak is not None]
    return torch.stack(peaks).amax(0)


def _columns(site: Site, source: Checkpoint) -> torch.Tensor:
    """The largest magnitude of each column of all consumers `[in]`."""
    weights = (source.entries[name].load().dequantize() for name in site.consumers)
    return torch.stack([w.abs().flatten(0, -2).amax(0) for w in weights]).amax(0)


def _scale(inputs: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """Of geometric mean 1, which changes nothing for rounding; 1 also where nothing comes in or all weights are 0."""
    seen = (inputs > 0) & (weights > 0)
    logs = alpha * inputs.log() - (1 - alpha) * weights.log()
    return torch.where(seen, (logs - logs[seen].mean()).exp(), 1.0)
