"""AWQ (Lin et al., 2023): weights that meet large inputs are rounded finer, by scales moved into what feeds them.

The scale of an input is x^alpha / w^beta: its root mean square, and that of the weights that it meets. For every site
alpha and beta are those of a grid, no scaling among them, for which the consumers' outputs change least when their own
solver rounds the scaled weight. What the layers read is collected on the original model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from fewbits.calibration.statistics import Experts, Found, Statistics
from fewbits.calibration.walk import Batches, Walk
from fewbits.checkpoint import Checkpoint
from fewbits.codecs.base import Codec
from fewbits.containers.base import Progress
from fewbits.lazy import torch
from fewbits.recipe import Choice
from fewbits.solvers import solve
from fewbits.transforms.sites import Site

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
BETAS = (0.5, 0.0, 0.25, 0.75, 1.0)  # the first with every alpha, the others with the best
ROWS = 128  # of a site's weights that scales are chosen on, spread evenly over them; of all its experts together
LEAST_GAIN = 0.03  # less than this on a sample of rows may be nothing on all of them


def scales(source: Checkpoint, sites: list[Site], choices: Mapping[str, Choice], batches: Batches,
           progress: Progress | None = None, combine: Callable[[Found], None] | None = None) -> dict[str, torch.Tensor]:
    """Producer -> its scale `[out]`, of every site where scaling lowers the loss on the calibration batches.

    `combine` is that of the walk.
    """
    found: dict[str, torch.Tensor] = {}
    walk = Walk(source, batches, combine=combine)
    for block in walk:
        here = [s for s in sites if s.consumers[0].startswith(block.prefix)
                and any(c in choices and choices[c].solver for c in s.consumers)]
        statistics = block.statistics() if here else {}
        for site in here:
            scale = _best(list(_weights(site, source, choices, statistics)), site.rows,
                          source.entries[site.producer].shape[0])
            if scale is not None:
                found[site.producer] = scale
        if progress:
            progress("scaling", block.index + 1, len(walk))
    return found


@dataclass(frozen=True)
class _Weight:
    """Rows of weights that are rounded alike on the same inputs."""

    rows: torch.Tensor  # [rows, in]
    codec: Codec
    solver: str
    moment: torch.Tensor  # second moment of the inputs, [in, in]
    share: float = 1.0  # what an error of these rows counts

    def some(self, count: int) -> _Weight:
        """`count` of the rows, for all of them."""
        rows = self.rows[::-(-len(self.rows) // count)].contiguous()
        return replace(self, rows=rows, share=self.share * len(self.rows) / len(rows))

    def loss(self, scale: torch.Tensor) -> float:
        """tr((W - Q/s) H (W - Q/s)^T), with Q the rounded W s and H the second moment of the inputs."""
        seen = Statistics(self.moment / scale / scale[:, None], len(self.moment))
        error = self.rows - solve(self.rows * scale, self.codec, self.solver, seen).dequantize() / scale
        return self.share * float(((error @ self.moment) * error).sum())


def _weights(site: Site, source: Checkpoint, choices: Mapping[str, Choice],
             statistics: Mapping[str, Found]) -> Iterator[_Weight]:
    """The consumers that are quantized and whose inputs were seen; experts count by the tokens they got."""
    together: dict[tuple[int, Codec, str], list[str]] = {}
    for name in site.consumers:
        choice = choices.get(name)
        if choice and choice.solver and name in statistics:
            together.setdefault((id(statistics[name]), choice.codec, choice.solver), []).append(name)
    for (_, codec, solver), names in together.items():
        seen = statistics[names[0]]
        weight = torch.cat([source.entries[name].load().dequantize() for name in names], dim=-2)
        if not isinstance(seen, Experts):
            yield _Weight(weight, codec, solver, seen.moment).some(ROWS)
            continue
        for i, count in enumerate(seen.counts):
            if count:
                one = _Weight(weight[i], codec, solver, seen.expert(i).moment, count / sum(seen.counts))
                yield one.some(max(1, ROWS // len(weight)))


def _best(weights: list[_Weight], rows: torch.Tensor, outputs: int) -> torch.Tensor | None:
    """The best scale `[outputs]`; None where it gains too little."""
    inputs = _means([(w.moment.diagonal(), w.share * len(w.rows)) for w in weights], rows, outputs)
    columns = _means([(w.rows.square().sum(0), w.share) for w in weights], rows, outputs)

    def tried(a: float, b: float) -> tuple[float, float, float]:
        scale = _scale(inputs, columns, a, b)[rows]
        return sum(w.loss(scale) for w in weights), a, b

    unscaled = sum(w.loss(torch.ones(len(rows))) for w in weights)
    first = min(tried(a, BETAS[0]) for a in ALPHAS)
    least, alpha, beta = min(first, *(tried(first[1], b) for b in BETAS[1:]))
    return _scale(inputs, columns, alpha, beta) if least < (1 - LEAST_GAIN) * unscaled else None


def _means(parts: list[tuple[torch.Tensor, float]], rows: torch.Tensor, outputs: int) -> torch.Tensor:
    """Mean of the parts `[in]` by their shares, over the inputs that an output of the producer is."""
    total = torch.zeros(outputs)
    for part, share in parts:
        total.index_add_(0, rows, part, alpha=share)
    return total / rows.bincount(minlength=outputs)


def _scale(inputs: torch.Tensor, columns: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """Mean squares to scales of geometric mean 1; 1 also where nothing comes in or all weights are zero."""
    seen = (inputs > 0) & (columns > 0)
    logs = (alpha * inputs.log() - beta * columns.log()) / 2
    return torch.where(seen, (logs - logs[seen].mean()).exp(), 1.0)
