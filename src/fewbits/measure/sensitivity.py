"""What each tensor of a model loses in each codec: measured with it alone quantized, or estimated for all at once."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewbits import codecs as all_codecs
from fewbits import containers, hub, solvers
from fewbits import imatrix as matrices
from fewbits.calibration import sources
from fewbits.calibration.sources import Batch, Calibration
from fewbits.calibration.statistics import Known
from fewbits.checkpoint import Checkpoint
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError
from fewbits.imatrix import Imatrix
from fewbits.measure.circumstances import circumstances, identity
from fewbits.measure.curvature import Curvature
from fewbits.measure.ledger import Ledger, Loss
from fewbits.measure.trials import Trials, replaced
from fewbits.memory import available_bytes
from fewbits.qtensor import QTensor
from fewbits.recipe import ModelFacts
from fewbits.recipe.facts import LINEAR, Fact
from fewbits.runtime.sequences import Array

SAMPLES, LENGTH = 4, 512  # sequences that losses are found on, and their tokens
MEASURED_ON = 2  # of them, where the whole model is run for each loss
USUAL = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")  # where no codec is asked for
EMBEDDINGS = {"token_embd", "output", "embedding"}  # roles


@dataclass(frozen=True)
class Sensitivity:
    """Losses of a model's tensors, those of the worst tensor first."""

    model: str
    losses: list[Loss]
    text: str
    tokens: int  # that measured losses are the mean over
    seconds: float
    circumstances: dict[str, Any] = field(compare=False, repr=False)

    @property
    def codecs(self) -> list[str]:
        """From few bits to many, as they were asked for."""
        return list(dict.fromkeys(loss.codec for loss in self.losses))

    def table(self) -> dict[str, dict[str, Loss]]:
        """Tensor -> codec -> loss; a measured one goes before an estimate."""
        found: dict[str, dict[str, Loss]] = {}
        for loss in sorted(self.losses, key=lambda x: x.measured):
            found.setdefault(loss.tensor, {})[loss.codec] = loss
        return dict(sorted(found.items(), key=lambda row: -max(x.kl for x in row[1].values())))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sensitivity(model: str | Path | Checkpoint, codecs: Sequence[str] = USUAL, *,
                text: str | Path | Calibration | Sequence[Batch] = "self", samples: int = SAMPLES, length: int = LENGTH,
                seed: int = 0, imatrix: str | Path | Imatrix | None = None, estimate: bool = False,
                progress: Progress | None = None) -> Sensitivity:
    """What each matrix of `model` loses in each of `codecs`, on `samples` sequences of `text` (see
    `sources.calibration`). Tensors that a codec doesn't take have no loss in it.

    Each loss is measured: the model runs with that tensor alone quantized, by a search weighted with `imatrix` where
    that is given. With `estimate` those of linear layers are estimated instead, all of them from one backward pass.
    What is found is kept in the cache as it comes, and a killed run goes on there.

    Raises:
        FewbitsError: an unknown codec, no text, a model that writes none.
    """
    began = time.monotonic()
    source = model if isinstance(model, Checkpoint) else containers.open(hub.locate(model))
    wanted = {name: all_codecs.get(name) for name in codecs}
    matrix = imatrix if isinstance(imatrix, Imatrix) or imatrix is None else matrices.read(Path(imatrix))
    used = sources.calibration(text, source, samples=samples, length=length, seed=seed, progress=progress)
    losses = Losses(source, used, matrix.statistics(source) if matrix else {}, seed, progress)
    facts = [f for f in ModelFacts.of(source).tensors if losses.takes(f)]
    asked = {f.name: [name for name, codec in wanted.items() if codec.check(f.shape) is None] for f in facts}
    found = losses.estimated(asked) if estimate else {}
    rest = {n: [c for c in several if (n, c) not in found] for n, several in asked.items()}
    found |= losses.measured(rest)
    told = circumstances(source, text=used.description, seed=seed, imatrix=str(imatrix) if imatrix else None,
                         solver="search", kernels=[losses.trials.kernel])
    return Sensitivity(str(source.path), sorted(found.values(), key=lambda x: list(wanted).index(x.codec)),
                       used.description, losses.trials.tokens, time.monotonic() - began, told)


class Losses:
    """Finds losses of one model on one text; importances weigh the search that quantizes."""

    def __init__(self, source: Checkpoint, text: Calibration, importances: Mapping[str, Known], seed: int = 0,
                 progress: Progress | None = None):
        self.source, self.importances, self.seed, self.progress = source, importances, seed, progress
        self.windows = windows_of(source, text.batches)
        self._own = identity(source)["sha256"]
        self._kept: dict[tuple[str, str], QTensor] = {}
        self._room = available_bytes() // 4
        self._known = [text.digest(), _digest(importances), seed]

    @cached_property
    def trials(self) -> Trials:
        return Trials(self.source, self.windows[:MEASURED_ON])

    @staticmethod
    def takes(fact: Fact) -> bool:
        """Whether a tensor is a matrix that recipes quantize."""
        return len(fact.shape) > 1 and (fact.role in LINEAR or fact.role in EMBEDDINGS) and fact.role != "conv1d"

    def quantized(self, name: str, codec: str) -> QTensor:
        """One tensor in one codec, by search; kept while memory is plenty."""
        if (name, codec) not in self._kept:
            weight = self.source.entries[name].load().dequantize()
            q = solvers.solve(weight, all_codecs.get(codec), "search", self.importances.get(name))
            self._room -= q.nbytes
            if self._room < 0:
                return q
            self._kept[name, codec] = q
        return self._kept[name, codec]

    def measured(self, asked: Mapping[str, Collection[str]],
                 company: Mapping[str, QTensor] | None = None) -> dict[tuple[str, str], Loss]:
        """What each tensor adds to the divergence of a model in which `company` is quantized already, by running it."""
        company = {} if company is None else company
        ledger = self._ledger(company)
        total, done = sum(map(len, asked.values())), 0
        found = {}
        for name, several in asked.items():
            others = replaced(self.source, {n: q for n, q in company.items() if n != name})
            without: Array | None = None if company else np.zeros(())
            for codec in several:
                if self.progress:
                    self.progress(f"measuring: {name} in {codec}", done, total)
                done += 1

                if (name, codec, True) not in ledger.losses:
                    without = self.trials.divergence(others) if without is None else without
                    own = self.trials.divergence(replaced(others, {name: self.quantized(name, codec)})) - without
                    error = float(own.std(ddof=1)) / math.sqrt(own.size)
                    ledger.add([Loss(name, codec, float(own.mean()), error, True)])
                found[name, codec] = ledger.losses[name, codec, True]
        return found

    def estimated(self, asked: Mapping[str, Collection[str]],
                  company: Mapping[str, QTensor] | None = None) -> dict[tuple[str, str], Loss]:
        """The same of linear layers, from the curvature at the model in which `company` is quantized; others are left
        out."""
        company = {} if company is None else company
        ledger = self._ledger(company)
        names = [n for n in asked if self._linear(n)]
        known = {(n, c): ledger.losses.get((n, c, False)) for n in names for c in asked[n]}
        if all(known.values()):
            return {key: loss for key, loss in known.items() if loss}
        curvature = Curvature(replaced(self.source, company), self.windows, self.seed, self.progress)
        for i, name in enumerate(names):
            if self.progress:
                self.progress(f"estimating: {name}", i, len(names))
            if name in curvature.inputs:
                original = self.source.entries[name].load().dequantize()
                kls = curvature.losses(name, original, (self.quantized(name, c) for c in asked[name]))
                ledger.add([Loss(name, c, kl, None, False) for c, kl in zip(asked[name], kls, strict=True)])
        return {(n, c): ledger.losses[n, c, False] for n, c in known if (n, c, False) in ledger.losses}

    def _linear(self, name: str) -> bool:
        return len(self.source.entries[name].shape) == 2

    def _ledger(self, company: Mapping[str, QTensor]) -> Ledger:
        others = sorted((n, q.codec.name) for n, q in company.items())
        return Ledger([self._own, *self._known, others] if self._own else None)


def windows_of(source: Checkpoint, batches: Sequence[Batch]) -> torch.Tensor:
    """The sequences of a text, `[sequences, tokens]`.

    Raises:
        FewbitsError: a model that reads something else.
    """
    rows = [b["input_ids"] for b in batches if set(b) == {"input_ids"}]
    if len(rows) != len(batches) or len({r.shape[-1] for r in rows}) > 1:
        raise FewbitsError(f"{source.path}: losses are found on sequences of tokens, all of a length",
                           "give a text")
    return torch.cat([r.reshape(-1, r.shape[-1]) for r in rows])


def _digest(importances: Mapping[str, Known]) -> str:
    found = hashlib.sha256()
    for name, known in sorted(importances.items()):
        values = getattr(known, "values", None)
        found.update(name.encode() + (b"" if values is None else values.numpy().tobytes()))
    return found.hexdigest()
